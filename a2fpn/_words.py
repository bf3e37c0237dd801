"""Vocabulary of ultralytics, torchvision, detectron2 and mmdetection, mapped to advice for people who type it here.

A word maps to one of our names or to a sentence; :func:`a2fpn._registry.did_you_mean` turns a name into a question.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType


def _words(meanings: Mapping[str, str]) -> Mapping[str, str]:
    """Map each word to its meaning, from meanings with their space-separated words in other libraries."""
    return MappingProxyType({word: meaning for meaning, words in meanings.items() for word in words.split()})


_SIZES = "Images are resized by the model's rule: create_model(..., min_size=800, max_size=1333), or tile=1024 here."
_DEVICE = "Set it when creating the predictor: Predictor(model, device='cuda')."
_HALF = "For speed: optimize_for_inference(model, dtype=torch.bfloat16)."
_PICTURES = "Draw the result: result.plot().save('overlay.png')."
_KEEP = "Filter the result: result['cat'] keeps the objects of one class."
_PRETRAINED = "Weights are loaded by name: pretrained=True, with a tag of list_pretrained() if there are several."

PREDICTION = _words(
    {
        "score_threshold": "conf conf_thres confidence threshold score_thr score_thresh "
        "score_thresh_test box_score_thresh min_score pred_score_thr min_confidence confidence_score prob "
        "prob_threshold det_thresh box_threshold detection_threshold conf_threshold",
        "nms_threshold": "iou iou_thres iou_threshold iou_thr nms nms_thr nms_thresh nms_thresh_test nms_iou_thr "
        "box_nms_thresh",
        "max_objects": "max_det max_detections max_per_img box_detections_per_img detections_per_img "
        "detections_per_image topk top_k keep_top_k max_per_image topk_per_image",
        "tta": "augment aug test_time_augmentation",
        "tile": "slice slice_size slice_height slice_width tile_size",
        "overlap": "overlap_ratio slice_overlap",
        "workers": "num_workers thread_workers",
        _SIZES: "imgsz img_size image_size input_size size sizes resize min_size max_size",
        _DEVICE: "device gpu cuda",
        _HALF: "half fp16 bf16 dtype amp",
        _PICTURES: "save show save_txt save_crop save_conf project visualize visualizer out_dir return_vis no_save_vis "
        "show_labels hide_labels show_boxes show_conf line_width line_thickness palette",
        _KEEP: "classes categories",
        "Images are predicted one at a time, without output.": "batch_size stream verbose print_result",
        "NMS is done per class; nms_threshold sets its IoU threshold.": "agnostic_nms agnostic class_agnostic",
        "Masks always have the size of the image.": "retina_masks",
        "Videos are not supported: pass their frames as arrays.": "vid_stride stream_buffer fps",
        "Set it when creating the predictor: Predictor(a2fpn.from_pretrained(PATH)).": "weights model model_path "
        "checkpoint ckpt cfg config data",
        "Pass the images first, without a keyword: predictor('image.jpg').": "source input inputs image images img",
    }
)
"""Options of a :class:`a2fpn.Predictor`."""

MODEL = _words(
    {
        "num_classes": "nc n_class n_classes num_class num_cls classes_count class_num",
        "categories": "names classes class_names labels metainfo",
        _PRETRAINED: "weights checkpoint weights_enum load_from ckpt",
        "pretrained_backbone": "weights_backbone pretrained_backbone_weights encoder_weights imagenet init_cfg",
        "in_chans": "ch channels in_channels input_channels n_channels num_channels",
        "norm": "norm_layer norm_cfg norm_type",
        "size_divisor": "size_divisibility pad_size_divisor",
        "anchor_sizes": "anchors anchor_generator rpn_anchor_generator anchor_scales scales",
        "anchor_ratios": "aspect_ratios ratios aspect_ratio",
        "trainable_layers": "trainable_backbone_layers freeze_at frozen_stages freeze",
        "min_size": "imgsz img_size img_scale input_size",
        "score_threshold": "conf box_score_thresh score_thr score_thresh score_thresh_test",
        "nms_threshold": "iou box_nms_thresh nms_thresh nms_thr nms_thresh_test",
        "detections_per_image": "max_det box_detections_per_img detections_per_img max_per_img",
        "mean": "image_mean pixel_mean",
        "std": "image_std pixel_std",
        "rpn_fg_iou": "rpn_fg_iou_thresh box_fg_iou_thresh",
        "box_batch_size": "box_batch_size_per_image roi_batch_size",
        "rpn_batch_size": "rpn_batch_size_per_image",
        "rpn_nms_threshold": "rpn_nms_thresh",
        "rpn_score_threshold": "rpn_score_thresh",
        "Move it like any module: create_model(...).to('cuda').": "device",
        "Downloads show their own progress; leave it out.": "progress verbose",
        "The backbone is the name of a timm model: backbone='resnet50'.": "encoder encoder_name backbone_name",
        "The neck is a name of list_necks(): neck='a2fpn'.": "fpn neck_name use_fpn",
        "Weights of a backbone in a file: backbone_weights=FILE.": "checkpoint_path backbone_path",
        "The model's name selects the heads: 'maskrcnn_...', 'retinanet_...'; docs/extending.md adds your own.": "head "
        "heads box_head box_predictor bbox_head mask_head mask_predictor roi_head roi_heads rpn_head task",
        "Settings are separate arguments: create_model(..., nms_threshold=0.5).": "train_cfg test_cfg "
        "data_preprocessor",
        "A model is a name and arguments: create_model('maskrcnn_fpn_r50', num_classes=5).": "cfg",
        "The neck's arguments are a dict: neck_args={'out_channels': 256}.": "fpn_channels out_channels",
    }
)
"""Arguments of :func:`a2fpn.create_model`."""

SETTINGS = _words(
    {
        "run.epochs": "epochs max_epochs num_epochs num_train_epochs",
        "run.max_steps": "max_iter max_iters iterations",
        "data.batch_size": "batch batch_size samples_per_gpu ims_per_batch",
        "optim.lr": "lr lr0 base_lr learning_rate",
        "data.workers": "workers num_workers workers_per_gpu",
        "optim.name": "optimizer",
        "run.output": "project output_dir work_dir save_dir output",
        "run.mixed_precision": "amp half fp16 bf16",
        "model.overrides.min_size": "imgsz img_size img_scale image_size",
        "model.name": "weights load_from checkpoint",
        "model.overrides": "backbone neck num_classes categories",
        "data.root": "data dataset datasets path dir folder data_dir data_root source",
        "run.ema": "ema",
        "run.seed": "seed",
        "run.patience": "patience",
        "run.resume": "resume resume_from",
        "run.deterministic": "deterministic",
        "optim.momentum": "momentum",
        "optim.weight_decay": "weight_decay",
        "optim.warmup_steps": "warmup warmup_steps warmup_epochs warmup_iters",
        "optim.clip_norm": "grad_clip clip_grad clip_gradients max_grad_norm clip_grad_norm gradient_clip_val",
        "optim.schedule": "cos_lr scheduler lr_scheduler lr_schedule param_scheduler",
        "optim.final_factor": "lrf",
        "optim.milestones": "lr_steps lr_drop steps milestones",
        "run.name": "name exp_name",
        "run.evaluate_every": "eval_interval eval_period val_interval val_period",
        "run.checkpoint_every": "save_period save_steps checkpoint_interval checkpoint_period",
        "run.log_every": "log_interval print_freq logging_steps",
        "run.grad_accumulation": "accumulate accumulate_grad_batches accumulative_counts grad_accum "
        "gradient_accumulation_steps",
        "run.trackers": "wandb tensorboard logger report_to",
        "model.pretrained": "pretrained",
        "data.transforms.horizontal_flip": "flip fliplr hflip random_flip flip_ratio",
        "data.transforms.vertical_flip": "flipud vflip",
        "data.transforms.color_jitter": "hsv_h hsv_s hsv_v brightness contrast",
        "Stages of the backbone that are trained: model.overrides.trainable_layers=3.": "freeze freeze_at "
        "frozen_stages trainable_layers trainable_backbone_layers",
        "a2fpn train --help lists all changes of images, data.transforms.*.": "mosaic mixup degrees translate shear "
        "perspective augment augmentation augmentations transforms",
        "Set the share of validation images with a2fpn data import DIR --val 0.2.": "val_split split test_size",
        (
            "The first GPU is used if there is one: CUDA_VISIBLE_DEVICES=1 selects another, accelerate launch -m "
            "a2fpn.training uses several."
        ): "device gpus gpu",
    }
)
"""Settings of ``a2fpn train``."""

OPTIONS = _words(
    {
        "--score-threshold": "conf conf_thres confidence confidence_threshold threshold min_score score_thr "
        "pred_score_thr",
        "--nms-threshold": "iou iou_thres nms nms_thr",
        "--max-objects": "max_det max_detections max_per_img detections_per_image",
        "--model": "weights checkpoint ckpt cfg config",
        "--tta": "augment aug",
        "--output": "project out_dir save_dir out output_dir show_dir work_dir",
        "--overwrite": "exist_ok force",
        "--tile": "slice slice_size tile_size slice_height",
        "--dtype bf16": "half fp16 bf16 amp",
        "--device": "gpu gpus cuda device_id cpu",
        "--format": "save_txt save_conf save_json",
        "IMAGES without an option": "source input inputs",
        "--annotations": "gt ann ann_file json_file",
        "--images": "img_dir image_dir img_folder image_folder",
    }
)
"""Options of the commands."""

COMMANDS = _words(
    {
        "predict": "detect segment infer inference test_images run",
        "evaluate": "val validate eval test metrics",
        "train": "fit finetune fine_tune",
        "data import": "convert import",
        "hub push": "push publish upload",
        "list": "models zoo ls",
        "check-data": "check checks verify_data",
        "app": "serve gradio ui web",
        "--version": "version",
        "--help": "help",
    }
)
"""Commands of the command line."""

RESULT = _words(
    {
        "boxes": "xyxy xyxys xywh xyxyn xywhn pred_boxes bboxes bbox box",
        "scores": "conf confidence confidences score probs",
        "labels": "cls class_id class_ids pred_classes classes label",
        "masks": "mask pred_masks segmentation segmentations segments polygons",
        "Pixels of each mask: result.masks.sum((1, 2)); a2fpn predict --format csv lists areas.": "area areas",
        "load_image": "orig_img img orig_image",
        "size": "orig_shape shape image_size",
        _PICTURES: "render draw visualize show save",
        "to_coco": "tojson to_json json to_dict pandas to_df to_csv save_txt",
        "keypoints": "kpts pred_keypoints keypoint",
        "above": "filter threshold",
        "names": "class_name class_names name",
    }
)
"""Attributes of a :class:`a2fpn.Result`."""


_DETECTORS = ("cascademaskrcnn", "cascadercnn", "maskrcnn", "fasterrcnn", "keypointrcnn", "retinanet", "fcos", "htc")
_ABSENT = re.compile(
    r"(yolo|rt-?detr|detr|dino|sam\d?[_.-]|fast-?sam|ssd|efficientdet|centernet|mask2former|solo)", re.I
)


def advice_on_model(name: str) -> str | None:
    """Advice on the name of another library's model; None for any other name.

    Example:
        >>> advice_on_model("maskrcnn_resnet50_fpn_v2"), advice_on_model("mask-rcnn_r101_fpn_1x_coco")
        ("Did you mean 'maskrcnn_fpn_r50.tv_coco_v2'?", "Did you mean 'maskrcnn_fpn_r101'?")
    """
    text = re.sub(r"\.(pth?|yaml|py)$", "", name.lower())
    if _ABSENT.match(text):
        return (
            f"{text[:40]} is not available. Small and fast: 'fcos_fpn_lite0', 'retinanet_fpn_lite0', and with masks "
            "'maskrcnn_fpn_lite0'; a2fpn list shows all."
        )
    flat = re.sub(r"[-_]", "", text)
    detector = next(filter(flat.startswith, _DETECTORS), None)
    resnet = re.search(r"(?<![a-z])(?:resnet|r)[-_]?(18|34|50|101)(?!\d)", text)
    mobile = "mobilenet_v3_large" in text
    # Other libraries name the backbone first, we name the neck first.
    if detector is None or not (resnet or mobile) or "fpn" not in text[resnet.end() if resnet else 0 :]:
        return None
    neck = next((neck for neck in ("pafpn", "bifpn", "carafe") if neck in text), "fpn").replace("carafe", "carafe_fpn")
    torchvisions = re.search(r"_(?:resnet50|mobilenet_v3_large)(_320)?_fpn(_v2)?$", text)
    tag = f".tv_coco{torchvisions[1] or torchvisions[2] or ''}" if torchvisions else ""
    backbone = f"r{resnet[1]}" if resnet else "mobilenetv3_large_100"
    return f"Did you mean '{detector}_{neck}_{backbone}{tag}'?"
