"""Methods of other libraries' models, each of which raises with the equivalent of this package."""

from __future__ import annotations

from typing import Any, NoReturn, TypeVar

from torch import nn

from a2fpn.errors import ConfigTypeError

ModuleT = TypeVar("ModuleT", bound="Elsewhere")
_TRAINING = "Train with a2fpn train --config finetune_folder data.root=DIR."


class Elsewhere(nn.Module):
    """Mixin of methods known from other libraries, answered with advice."""

    def predict(self, *_: Any, **__: Any) -> NoReturn:
        """Say how images are predicted."""
        raise ConfigTypeError("A detector takes tensors; images and files go to a2fpn.Predictor(model)('image.jpg').")

    def val(self, *_: Any, **__: Any) -> NoReturn:
        """Say how a model is measured."""
        raise ConfigTypeError(
            "Evaluate with a2fpn evaluate --model CHECKPOINT --images DIR --annotations JSON, or with "
            "a2fpn.evaluation.evaluate_coco on its results."
        )

    def fit(self, *_: Any, **__: Any) -> NoReturn:
        """Say how a model is trained."""
        raise ConfigTypeError(_TRAINING)

    def export(self, *_: Any, **__: Any) -> NoReturn:
        """Say how a model is exported."""
        raise ConfigTypeError("Export with a2fpn.export_model(model, 'model.onnx').")

    def save(self, *_: Any, **__: Any) -> NoReturn:
        """Say how a model is saved."""
        raise ConfigTypeError("Save with a2fpn.save_pretrained(model, 'my_model').")

    def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        """Say how a model is saved."""
        self.save()

    def push_to_hub(self, *_: Any, **__: Any) -> NoReturn:
        """Say how a model is published."""
        raise ConfigTypeError("Publish with a2fpn.push_to_hub(model, 'org/name').")

    def train(self: ModuleT, mode: bool = True, **settings: Any) -> ModuleT:
        """Set the training mode, as of every module.

        Args:
            mode: Whether to set training mode.
            **settings: Settings of a training run, which this method does not start.

        Raises:
            TypeError: If settings are given.
        """
        if settings or not isinstance(mode, bool):
            raise ConfigTypeError(_TRAINING)
        return super().train(mode)
