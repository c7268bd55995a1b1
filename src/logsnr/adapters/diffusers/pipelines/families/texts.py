"""Models told a text, through the pipeline's own `encode_prompt`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from logsnr.adapters.diffusers.pipelines.families.base import Conditions, Family, Prompt, Row, Size, defaults
from logsnr.errors import LogsnrError

HANDED_ON = (
    "max_sequence_length",
    "complex_human_instruction",
    "clean_caption",
    "prompt_template",
    "text_encoder_out_layers",
)
"""What a pipeline's call hands on to its `encode_prompt`, with a default of its own."""


class Text(Family):
    """Models told a text."""

    def __init__(self, pipeline: Any, row: Row, size: Size | None = None, frames: int | None = None) -> None:
        super().__init__(pipeline, row, size, frames)
        self.needs = tuple(name for name in self.answers if name and not name.startswith("-"))

    @property
    def answers(self) -> tuple[str, ...]:
        """The conditions among what `encode_prompt` answers."""
        return self.row.answers

    def conditions(self, prompt: Prompt, guidance: float = 1.0) -> Conditions:
        given = dict(prompt) if isinstance(prompt, Mapping) else {"prompt": self.texts(prompt)}
        return self._conditions(guidance, negative=False, **{"prompt": None, **given})

    def null(self, negative: Prompt | None, guidance: float = 1.0) -> Conditions:
        if isinstance(negative, Mapping):
            return self.conditions(negative, guidance)
        texts = None if negative is None else self.texts(negative)
        if not any(name.startswith("-") for name in self.answers):
            return self.conditions(texts or [""], guidance)
        given = {} if texts is None else {"negative_prompt": texts}
        return self._conditions(guidance, negative=True, prompt=[""] * len(texts or [""]), **given)

    def texts(self, prompt: Prompt) -> list[str]:
        """The prompts as a list."""
        given = [prompt] if isinstance(prompt, str) else prompt if isinstance(prompt, Sequence) else []
        texts = [text for text in given if isinstance(text, str)]
        if not texts or len(texts) != len(given):
            raise LogsnrError(f"prompt {prompt!r}: this model is told a text: give a string, or a list of them")
        return texts

    def _conditions(self, guidance: float, *, negative: bool, **given: Any) -> Conditions:
        """The conditions of the texts, or of the negative ones."""
        found: dict[str, Any] = {}
        for name, value in zip(self.answers, self._encoded(negative, **given), strict=False):
            if name and name.startswith("-") == negative:
                found[name.removeprefix("-")] = value
        states = found["encoder_hidden_states"]
        if isinstance(states, list):  # of one length each
            lengths = torch.tensor([len(each) for each in states])
            states = found["encoder_hidden_states"] = pad_sequence(states, batch_first=True)
            found["encoder_attention_mask"] = torch.arange(states.shape[1]) < lengths[:, None]
        for name in self.needs:
            if name.endswith("mask") and found.get(name) is None:
                found[name] = torch.ones(states.shape[:2], dtype=torch.long)
        cast = {k: v.to(self.model.dtype) if v.is_floating_point() else v for k, v in found.items()}
        return self._on({**cast, **self._more(states, guidance)})

    def _more(self, states: Tensor, guidance: float) -> dict[str, Any]:
        """Conditions beside those of the text."""
        return {"guidance": torch.full((len(states),), guidance, dtype=torch.float32)} if self.embedded else {}

    @torch.no_grad()
    def _encoded(self, negative: bool, **given: Any) -> Any:
        if not hasattr(self.pipeline, "encode_prompt"):
            raise LogsnrError(
                f"{type(self.pipeline).__name__} has no encode_prompt: pass the conditions by keyword "
                f"({', '.join(self.needs)}) instead of a prompt"
            )
        takes, call = defaults(self.pipeline.encode_prompt), defaults(self.pipeline.__call__)
        unknown = [name for name in given if name not in takes]
        if unknown:
            names = ", ".join(name for name in takes if "embeds" in name or "mask" in name)
            raise LogsnrError(f"prompt has {unknown[0]!r}: {type(self.pipeline).__name__} encodes a text, or {names}")
        own = {
            "device": self.model.device,
            "num_images_per_prompt": 1,
            "num_videos_per_prompt": 1,
            "do_classifier_free_guidance": negative,
            "prompt_2": None,
            "prompt_3": None,
            **{name: call[name] for name in HANDED_ON if call.get(name) is not None},
        }
        return self.pipeline.encode_prompt(**{name: own[name] for name in own if name in takes}, **given)


class StableDiffusion(Text):
    """`UNet2DConditionModel` with text, and SDXL's added conditions."""

    @property
    def answers(self) -> tuple[str, ...]:
        return (*self.row.answers, "text_embeds", "-text_embeds") if self.xl else self.row.answers

    @property
    def xl(self) -> bool:
        """Whether there are pooled texts and sizes."""
        return bool(self.config.addition_embed_type == "text_time")

    def _check(self) -> None:
        super()._check()
        kind, class_kind = self.config.addition_embed_type, self.config.class_embed_type
        score = getattr(self.pipeline.config, "requires_aesthetics_score", False)
        if self.vae is None or kind not in (None, "text_time") or class_kind is not None or score:
            raise LogsnrError(
                f"{type(self.pipeline).__name__} (addition_embed_type {kind!r}, class_embed_type {class_kind!r}"
                f"{', aesthetics score' if score else ''}) is neither Stable Diffusion nor SDXL: bind its inputs in a "
                "function and use logsnr.adapters.from_callable"
            )

    def _more(self, states: Tensor, guidance: float) -> dict[str, Any]:
        more: dict[str, Any] = {}
        if self.embedded:
            scales = torch.full((len(states),), guidance - 1)
            embedding = self.pipeline.get_guidance_scale_embedding(scales, self.config.time_cond_proj_dim)
            more["timestep_cond"] = embedding.to(self.model.dtype)
        if self.xl:
            height, width = (n * self.factor for n in self.shape[1:])
            ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=states.dtype)
            more["time_ids"] = ids.expand(len(states), -1)
        return more
