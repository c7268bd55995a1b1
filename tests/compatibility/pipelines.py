"""Which pipelines are made of which components, and how each is called.

A family is a set of components by the names of constructors' arguments, and of a call's arguments by theirs; a pipeline
takes from both what it has arguments for.  What nobody has is None, or the default.  "attributes" among the components
are set on the pipeline.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import diffusers
import families
import numpy as np
import PIL.Image
import torch
from pipelining import noise

from compatibility import components as made
from compatibility.judge import Case

STEPS = 5


def picture(height: int = 16, width: int = 16, seed: int = 0) -> Any:
    """A random picture."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def hole(height: int = 16, width: int = 16) -> Any:
    """A mask whose right half is to be filled."""
    pixels = np.zeros((height, width), dtype=np.uint8)
    pixels[:, width // 2 :] = 255
    return PIL.Image.fromarray(pixels)


def asked(height: int = 16, width: int = 16, frames: int = 5) -> dict[str, Any]:
    """What any pipeline may be asked, by the names of arguments."""
    shot, film = picture(height, width), [picture(height, width, seed) for seed in range(frames)]
    return {
        "prompt": "a red fox",
        "height": height,
        "width": width,
        "num_frames": frames,
        "num_inference_steps": STEPS,
        "guidance_scale": 3.0,
        "image": shot,
        "mask_image": hole(height, width),
        "control_image": picture(height, width, 7),
        "strength": 0.8,
        "video": film,
        "conditioning_frames": film,
        "batch_size": 1,
        "clean_caption": False,
        "use_resolution_binning": False,
        "class_labels": [3],
    }


Family = Callable[[], tuple[dict[str, Any], dict[str, Any]]]


def of_case(name: str, **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The components and the call of a case of tests/families.py."""
    case = families.CASES[name](made.tiny())
    call = dict(case.prompt) if isinstance(case.prompt, dict) else {"prompt": case.prompt}
    if isinstance(case.negative, dict) and case.scale_name:
        call |= {f"negative_{key}": value for key, value in case.negative.items()}
    if case.scale_name:
        call[case.scale_name] = 3.0
    if isinstance(case.prompt, dict):
        call["prompt"] = None
    size = {key: case.asked[key] for key in ("height", "width") if key in case.asked}
    frames = {"frames": case.asked["num_frames"]} if "num_frames" in case.asked else {}
    return {**case.pipe.components, **more}, {**asked(**size, **frames), **case.asked, **call}


FAMILIES: list[tuple[str, Family]] = []


def family(*names: str) -> Callable[[Family], Family]:
    """Register a family under patterns of its pipelines' names, without the "Pipeline" at their end."""

    def register(made: Family) -> Family:
        FAMILIES.append(("|".join(names), made))
        return made

    return register


@family("DDPM", "DDIM")
def unconditional() -> Any:
    return {"unet": made.pixel_unet(), "scheduler": diffusers.DDIMScheduler()}, asked()


@family("LDM")
def latent_unconditional() -> Any:
    vq = diffusers.VQModel(block_out_channels=(8,), norm_num_groups=4, latent_channels=3, sample_size=8)
    return {"unet": made.pixel_unet(), "vqvae": vq.eval(), "scheduler": made.ddim()}, asked()


@family("DiT")
def class_conditional() -> Any:
    return made.dit(), asked()


@family("StableDiffusion(PAG)?", "StableDiffusion(LDM3D|Panorama|Img2Img|PAGImg2Img|Inpaint|PAGInpaint|InpaintLegacy)",
        "StableDiffusion(SAG|ModelEditing)", "AltDiffusion(Img2Img)?")  # fmt: skip
def stable_diffusion() -> Any:
    return made.stable_diffusion(), {**asked(), "token_indices": [1], "max_iter_to_alter": 0}


@family("StableDiffusionAdapter")
def adapted() -> Any:
    return made.adapted(made.stable_diffusion()), asked()


@family("StableDiffusionXLAdapter")
def sdxl_adapted() -> Any:
    return made.adapted(made.sdxl()), asked()


@family("StableDiffusionInstructPix2Pix")
def instructed() -> Any:
    return made.stable_diffusion(in_channels=8), asked()


@family("StableDiffusionControlNet(PAG)?", "StableDiffusionControlNet(PAG)?(Img2Img|Inpaint)")
def controlled() -> Any:
    return made.stable_diffusion(), asked()


@family("StableDiffusionGLIGEN")
def gligen() -> Any:
    parts = made.stable_diffusion(attention_type="gated")
    return parts, {**asked(), "gligen_phrases": ["a fox"], "gligen_boxes": [[0.1, 0.1, 0.6, 0.6]]}


@family("StableDiffusionUpscale")
def upscaled() -> Any:
    parts = made.stable_diffusion(in_channels=7, num_class_embeds=350)
    return {**parts, "low_res_scheduler": diffusers.DDPMScheduler()}, asked()


@family("StableDiffusionXL(PAG)?", "StableDiffusionXL(PAG)?(Img2Img|Inpaint)",
        "StableDiffusionXLControlNet(PAG)?(Img2Img|Inpaint)?")  # fmt: skip
def sdxl() -> Any:
    return made.sdxl(), asked()


@family("StableDiffusionXLInstructPix2Pix")
def sdxl_instructed() -> Any:
    return made.sdxl(in_channels=8), asked()


@family("StableDiffusionXLControlNetUnion(Img2Img|Inpaint)?")
def sdxl_union() -> Any:
    return made.sdxl(union=True), {**asked(), "control_mode": [0]}


@family("PIA")
def pia() -> Any:
    return made.animated(in_channels=9), {**asked(), "num_frames": 4}


@family("PixArtSigmaPAG")
def pixart_pag() -> Any:
    parts, call = of_case("pixart-sigma")
    return {**parts, "pag_applied_layers": ["blocks.0"]}, call


@family("Kolors(PAG|Img2Img)?")
def kolors() -> Any:
    words = {f"{sign}prompt_embeds": noise(1, 5, 32, seed=i) for i, sign in enumerate(("", "negative_"))}
    pooled = {f"{sign}pooled_prompt_embeds": noise(1, 16, seed=i) for i, sign in enumerate(("", "negative_"))}
    parts = made.sdxl()
    return {**parts, "text_encoder": None, "tokenizer": None}, {**asked(), **words, **pooled, "prompt": None}


@family("AnimateDiff(PAG|ControlNet|VideoToVideo|VideoToVideoControlNet)?")
def animated() -> Any:
    return made.animated(), {**asked(), "num_frames": 4, "conditioning_frames": [picture(seed=s) for s in range(4)],
                             "video": [picture(seed=s) for s in range(4)]}  # fmt: skip


@family("TextToVideoSD", "VideoToVideoSD")
def text_to_video() -> Any:
    return made.text_to_video(), {**asked(), "num_frames": 4, "video": [picture(seed=s) for s in range(4)]}


@family("StableVideoDiffusion")
def svd() -> Any:
    return made.svd(), {**asked(32, 32), "num_frames": 2, "decode_chunk_size": 2}


@family("StableDiffusion3", "StableDiffusion3(Img2Img|PAG|PAGImg2Img|ControlNet)")
def sd3() -> Any:
    return made.sd3(), asked()


@family("StableDiffusion3ControlNetInpainting")
def sd3_inpaint() -> Any:
    return made.sd3(extra=1), {**asked(), "control_mask": hole(), "control_image": picture(seed=7)}


@family("Flux", "Flux(Img2Img|Inpaint)", "FluxControlNet(Img2Img|Inpaint)?", "FluxKontext(Inpaint)?")
def flux() -> Any:
    return made.flux(), {**asked(), "max_area": 256, "_auto_resize": False}


@family("FluxControl(Img2Img|Inpaint)?")
def flux_control() -> Any:
    return made.flux(in_channels=32, out_channels=16), asked()


@family("FluxFill")
def flux_fill() -> Any:
    return made.flux(in_channels=48, out_channels=16), asked()


for pattern, name in (
    ("PixArtAlpha", "pixart-alpha"),
    ("PixArtSigma", "pixart-sigma"),
    ("Sana(PAG)?", "sana"),
    ("AuraFlow", "aura-flow"),
    ("CogView4", "cogview4"),
    ("Lumina2", "lumina2"),
    ("ZImage(Img2Img|Inpaint)?", "z-image"),
    ("Chroma(Img2Img|Inpaint)?", "chroma"),
    ("QwenImage(Img2Img|Inpaint)?", "qwen-image"),
    ("Flux2KleinInpaint", "flux2-klein"),
    ("LTX(ImageToVideo)?", "ltx"),
    ("Wan", "wan"),
    ("HunyuanVideo", "hunyuan-video"),
    ("CogVideoX(VideoToVideo)?", "cogvideox"),
):
    family(pattern)(lambda name=name: of_case(name))


@family("WanPipeline, two experts")
def wan22() -> Any:
    return of_case("wan-2.2")


@family("Flux2", "Flux2Klein(KV)?")
def flux2_of_words() -> Any:
    parts, call = of_case("flux2-klein")
    return parts, {**call, "image": None}


@family("LTXCondition")
def ltx_condition() -> Any:
    """Its strength is that of the picture: below 1 its tokens join the others late."""
    parts, call = of_case("ltx")
    return {**parts, "scheduler": families.flow(shift=1.0)}, {**call, "strength": 0.6}


@cache
def family_of(name: str) -> Family | None:
    """The family of a pipeline class; None if it is of none here."""
    from compatibility import images, rarer, sounds, videos  # noqa: F401, which register their own

    short = name.removesuffix("Pipeline").removesuffix("Text2Img")
    return next((one for pattern, one in FAMILIES if re.fullmatch(pattern, short)), None)


def present(name: str) -> Any:
    """A pipeline class of diffusers; None where it needs a library that is not installed."""
    try:
        kind = getattr(diffusers, name)
    except RuntimeError:  # an import within its module
        return None
    return None if "dummy" in kind.__module__ else kind


def built() -> list[str]:
    """The pipeline classes of diffusers that a family builds, and variants of them."""
    names = [name for name in sorted(dir(diffusers)) if name.endswith("Pipeline") and family_of(name)]
    kinds = {name: present(name) for name in names}
    of_pipelines = [name for name, kind in kinds.items() if kind and issubclass(kind, diffusers.DiffusionPipeline)]
    return [*of_pipelines, "WanPipeline, two experts"]


def case(name: str) -> Case:
    """A pipeline by its class's name, on tiny random components."""
    torch.manual_seed(0)
    found = family_of(name)
    assert found is not None
    parts, call = found()
    kind = getattr(diffusers, name.partition(",")[0])
    own = {}
    for parameter in list(inspect.signature(kind.__init__).parameters.values())[1:]:
        if parameter.name in parts:
            own[parameter.name] = parts[parameter.name]
        elif parameter.default is inspect.Parameter.empty and parameter.kind.name != "VAR_KEYWORD":
            own[parameter.name] = None
    takes = inspect.signature(kind.__call__).parameters
    given = {key: value for key, value in call.items() if key in takes}
    if "output_type" in takes:
        given["output_type"] = next((kind for pattern, kind in ANSWERS if re.match(pattern, name)), "latent")
    pipe = kind(**own)
    for key, value in parts.get("attributes", {}).items():
        setattr(pipe, key, value)
    return Case(pipe, given)


ANSWERS = (
    ("(DDPM|DDIM|DiT|LDM|StableDiffusionLDM3D|IF|KandinskyV22Controlnet|Kandinsky(Img2Img|Inpaint)?Pipeline)", "np"),
    ("(Marigold|Kandinsky(V22)?Prior)", "pt"),
)
"""What pipelines are asked for that do not answer with latents."""
