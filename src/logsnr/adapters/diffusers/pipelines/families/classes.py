"""Models told a class by its number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from logsnr.adapters.diffusers.pipelines.families.base import Conditions, Family, Prompt, Row, Size
from logsnr.errors import LogsnrError


class Classes(Family):
    """Models told a class by its number."""

    def class_ids(self, prompt: Prompt, count: int) -> Tensor:
        """Class numbers `[P]` of numbers, or of names where the pipeline has them."""
        if isinstance(prompt, Mapping):
            raise LogsnrError(f"prompt has {', '.join(prompt)}: this model is told a class: give its number")
        if isinstance(prompt, Tensor):
            ids = prompt.reshape(-1).tolist()
        else:
            ids = [prompt] if isinstance(prompt, str | int) else [*prompt]
        names = getattr(self.pipeline, "labels", None) or {}
        unknown = [name for name in ids if isinstance(name, str) and name not in names]
        if unknown:
            known = f"one of its {len(names)} names (pipeline.labels)" if names else "a number"
            raise LogsnrError(f"prompt {unknown[0]!r}: this model is told a class: give {known}, 0 ... {count - 1}")
        numbers = [names[name] if isinstance(name, str) else int(name) for name in ids]
        for number in numbers:
            if not 0 <= number < count:
                raise LogsnrError(f"class {number}: this model has classes 0 ... {count - 1}")
        return torch.tensor(numbers, device=self.model.device)


class Pixel(Classes):
    """`UNet2DModel`, with or without classes."""

    def __init__(self, pipeline: Any, row: Row, size: Size | None = None, frames: int | None = None) -> None:
        super().__init__(pipeline, row, size, frames)
        if self.config.class_embed_type is not None:
            raise LogsnrError(f"class_embed_type {self.config.class_embed_type!r}: use logsnr.adapters.from_callable")
        if self.classes:
            self.needs = ("class_labels",)

    def take_null(self, number: int) -> None:
        """Say which class stands for none."""
        if not 0 <= number < self.classes:
            raise LogsnrError(f"null_class = {number}: this model has classes 0 ... {self.classes - 1}")
        self.null_class = number

    @property
    def classes(self) -> int:
        return int(self.config.num_class_embeds or 0)

    def conditions(self, prompt: Prompt, guidance: float = 1.0) -> Conditions:
        if not self.classes:
            raise LogsnrError(f"prompt {prompt!r}: this model is unconditional; leave prompt out")
        return {"class_labels": self.class_ids(prompt, self.classes)}

    def null(self, negative: Prompt | None, guidance: float = 1.0) -> Conditions:
        if not self.classes:
            return super().null(negative, guidance)
        if negative is not None:
            return self.conditions(negative)
        if self.null_class is None:
            raise LogsnrError(
                f"guidance of a model with classes 0 ... {self.classes - 1} needs the class that stands for none: "
                f"give null_class (often the last, {self.classes - 1}), or leave guidance at 1"
            )
        return {"class_labels": torch.tensor([self.null_class], device=self.model.device)}


class Transformer(Classes):
    """`DiTTransformer2DModel`."""

    needs = ("class_labels",)

    def __init__(self, pipeline: Any, row: Row, size: Size | None = None, frames: int | None = None) -> None:
        super().__init__(pipeline, row, size, frames)
        self.null_class = self.classes

    @property
    def classes(self) -> int:
        return int(self.config.num_embeds_ada_norm)

    def conditions(self, prompt: Prompt, guidance: float = 1.0) -> Conditions:
        return {"class_labels": self.class_ids(prompt, self.classes)}

    def null(self, negative: Prompt | None, guidance: float = 1.0) -> Conditions:
        if negative is not None:
            return self.conditions(negative)
        return {"class_labels": torch.tensor([self.classes], device=self.model.device)}
