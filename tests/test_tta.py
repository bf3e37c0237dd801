"""Test-time augmentation, with detectors that know the truth."""

import pytest
import torch
from torch import Tensor

from a2fpn.heads import PostprocessConfig
from a2fpn.inference.tta import Augmentation, detect_augmented, fuse, move_masks
from a2fpn.masks.paste import paste_masks

RULE = PostprocessConfig(score_threshold=0.05)


def square_detector(image: Tensor) -> dict[str, Tensor]:
    """Finds the bright rectangle of an image, its left half as the mask."""
    bright = image[0] > 0.5
    rows, columns = torch.where(bright.any(1))[0], torch.where(bright.any(0))[0]
    box = torch.tensor([[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]], dtype=torch.float32)
    # Brightness in the second channel marks the half that is the object.
    x0, y0, x1, y1 = box[0].int().tolist()
    part = image[1, y0:y1, x0:x1]
    mask = torch.nn.functional.interpolate(part[None, None], size=(8, 8), mode="bilinear")
    return {"boxes": box, "scores": torch.tensor([0.8]), "labels": torch.tensor([2]), "masks": mask}


def picture() -> Tensor:
    image = torch.zeros(3, 64, 96)
    image[0, 16:48, 24:72] = 1
    image[1, 16:48, 24:48] = 1
    return image


@pytest.mark.parametrize("vertical", [False, True])
@pytest.mark.parametrize("horizontal", [False, True])
@pytest.mark.parametrize("size", [(64, 96), (128, 192)])
def test_views_are_moved_back(size: tuple[int, int], horizontal: bool, vertical: bool) -> None:
    augmentation = Augmentation(scales=(0.5, 1.0, 2.0), horizontal_flip=horizontal, vertical_flip=vertical)
    assert len(list(augmentation.views())) == 3 * (1 + horizontal) * (1 + vertical)
    found = detect_augmented(square_detector, picture(), size, augmentation, RULE)
    torch.testing.assert_close(found["boxes"], torch.tensor([[24.0, 16.0, 72.0, 48.0]]), rtol=0, atol=0.5)
    torch.testing.assert_close(found["scores"], torch.tensor([0.8]))
    assert found["labels"].tolist() == [2]
    mask = paste_masks(found["masks"], found["boxes"], (64, 96))[0, 0] > 0.5
    truth = picture()[1] > 0.5
    assert (mask & truth).sum() / (mask | truth).sum() > 0.9


def test_uint8_images_are_those_in_the_unit_range() -> None:
    augmentation = Augmentation(scales=(1.0,))
    a = detect_augmented(square_detector, picture(), (64, 96), augmentation, RULE)
    b = detect_augmented(square_detector, (picture() * 255).to(torch.uint8), (64, 96), augmentation, RULE)
    assert torch.equal(a["boxes"], b["boxes"])


def test_the_rule_holds_after_the_fusion() -> None:
    calls = []

    def once(image: Tensor) -> dict[str, Tensor]:
        calls.append(image)
        detection = square_detector(image)
        return {name: x[: len(calls) == 1] for name, x in detection.items()}

    augmentation = Augmentation(scales=(0.5, 1.0))
    found = detect_augmented(once, picture(), (64, 96), augmentation, RULE)
    torch.testing.assert_close(found["scores"], torch.tensor([0.2]))  # one view of four saw it
    calls.clear()
    assert not len(detect_augmented(once, picture(), (64, 96), augmentation, PostprocessConfig(0.3))["scores"])


def test_keypoints_are_refused() -> None:
    def keypoints(image: Tensor) -> dict[str, Tensor]:
        return {**square_detector(image), "keypoints": torch.zeros(1, 17, 3)}

    with pytest.raises(ValueError, match="can't flip keypoints"):
        detect_augmented(keypoints, picture(), (64, 96), Augmentation(), RULE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": ()}, r"scales must be one or more numbers between 0\.1 and 10, got \(\)"),
        ({"scales": (1.0, 20.0)}, r"got \(1\.0, 20\.0\)"),
        ({"iou": 1.5}, r"iou must be between 0 and 1, got 1\.5"),
    ],
)
def test_values_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)


def view(*rows: tuple[list[float], float, int], masks: Tensor | None = None) -> dict[str, Tensor]:
    found = {
        "boxes": torch.tensor([row[0] for row in rows]).reshape(-1, 4),
        "scores": torch.tensor([row[1] for row in rows]),
        "labels": torch.tensor([row[2] for row in rows], dtype=torch.int64),
    }
    return found if masks is None else {**found, "masks": masks}


def test_fused_boxes_are_means_weighted_by_the_scores() -> None:
    fused = fuse([view(([0.0, 0.0, 10.0, 10.0], 0.9, 1)), view(([0.0, 0.0, 13.0, 10.0], 0.3, 1))])
    torch.testing.assert_close(fused["boxes"], torch.tensor([[0.0, 0.0, 10.75, 10.0]]))
    torch.testing.assert_close(fused["scores"], torch.tensor([0.6]))


def test_an_object_that_one_view_saw_loses_score() -> None:
    box = [0.0, 0.0, 10.0, 10.0]
    fused = fuse([view((box, 0.9, 1)), view(), view()])
    torch.testing.assert_close(fused["scores"], torch.tensor([0.3]))


def test_classes_and_distant_boxes_stay_apart_and_the_best_comes_first() -> None:
    a, b = [0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0]
    fused = fuse([view((a, 0.5, 0), (b, 0.9, 0)), view((a, 0.7, 1), (b, 0.9, 0))])
    assert fused["labels"].tolist() == [0, 1, 0]
    torch.testing.assert_close(fused["scores"], torch.tensor([0.9, 0.35, 0.25]))
    assert torch.equal(fused["boxes"][0], torch.tensor(b))


def test_masks_are_averaged_by_score_in_the_fused_box() -> None:
    box = [0.0, 0.0, 8.0, 8.0]
    ones, zeros = torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    fused = fuse([view((box, 0.75, 0), masks=ones), view((box, 0.25, 0), masks=zeros)])
    torch.testing.assert_close(fused["masks"], torch.full((1, 1, 4, 4), 0.75))


def test_no_objects_at_all() -> None:
    masks = torch.zeros(0, 1, 4, 4)
    fused = fuse([view(masks=masks), view(masks=masks)])
    assert fused["boxes"].shape == (0, 4)
    assert fused["masks"].shape == (0, 1, 4, 4)


def test_a_moved_mask_covers_the_same_pixels() -> None:
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 4:12, 2:14] = 1
    old, new = torch.tensor([[10.0, 10.0, 42.0, 42.0]]), torch.tensor([[6.0, 8.0, 50.0, 47.0]])
    before = paste_masks(mask, old, (60, 60)) > 0.5
    after = paste_masks(move_masks(mask, old, new), new, (60, 60)) > 0.5
    assert (before & after).sum() / (before | after).sum() > 0.85
    assert torch.equal(move_masks(mask, old, old), mask)
