"""What of a model stock diffusers could sample: the conditions of `logsnr export`, known before a training begins.

A model fits a stock pipeline exactly when the state that its network wants is the pipeline's, and the timesteps that
the scheduler counts are its labels (adapters/diffusers/export.py has the table).
"""

from __future__ import annotations

from logsnr.denoiser import NetworkDenoiser
from logsnr.models.base import Network
from logsnr.predictions import EDM, LABELS, X0, Eps, Flow, Prediction, V, label_edm
from logsnr.timesteps import TimestepTable

STEPS = 1000
RECIPE = "prediction: {name: v, label: ddpm}"
EDM_RECIPE = "prediction: {name: edm, label: edm}"


def told_stock(denoiser: NetworkDenoiser) -> str:
    """Whether a model in training can be exported, in one line, and if not why, with the recipe that would."""
    found = obstacles(denoiser)
    if not found:
        return "stock diffusers can sample this model: logsnr export --to diffusers"
    why, change = ("; ".join(why for why, _ in found), ", ".join(change for _, change in found))
    return f"stock diffusers cannot sample this model (logsnr can): {why}; a recipe that exports has {change}"


def obstacles(denoiser: NetworkDenoiser) -> list[tuple[str, str]]:
    """Every reason why a model fits no stock pipeline, each with the change of a recipe that would."""
    prediction, network = denoiser.prediction, denoiser.network
    found = list(network.obstacles) if isinstance(network, Network) else []
    label = prediction.label if isinstance(prediction.label, str) else "its own"
    if isinstance(prediction, Flow):
        if prediction.path != "flow" or prediction.label not in ("flow", LABELS["flow"]):
            why = f"a flow network with path {prediction.path!r} and label {label!r} has no stock scheduler"
            found.append((why, "prediction: {name: flow, label: flow}"))
        elif denoiser.trained_range[1] < 100:
            why = (
                "stock flow schedulers start from pure noise, and it was trained to sigma "
                f"{denoiser.trained_range[1]:.4g}"
            )
            found.append((why, "objective.logsnr: [-9.3, ...]"))
    elif is_edm(prediction):
        shape = denoiser.shape
        if shape[1] != shape[2]:
            found.append((f"EDM's stock pipeline makes square images, not {shape[1]} x {shape[2]}", RECIPE))
    elif stock_kind(prediction) is None or label_table(prediction) is None:
        what = f", sigma_data {prediction.sigma_data:.4g}" if isinstance(prediction, EDM) else ""
        why = (
            f"prediction {prediction.name!r} (label {label!r}{what}) is none that stock schedulers know: they take "
            "eps, v and x0 of the VP path with a label of timesteps, flow with label flow, and edm with label edm"
        )
        found.append((why, EDM_RECIPE if isinstance(prediction, EDM) else RECIPE))
    return found


def is_edm(prediction: Prediction) -> bool:
    """Whether a prediction is EDM's, labelled as EDM's schedulers do."""
    return isinstance(prediction, EDM) and prediction.label in ("edm", label_edm)


def stock_kind(prediction: Prediction) -> str | None:
    """diffusers' name of what the network predicts of a VP state, or None."""
    kinds: dict[type[Prediction], str] = {Eps: "epsilon", V: "v_prediction", X0: "sample"}
    if isinstance(prediction, EDM):
        return "v_prediction" if prediction.sigma_data == 1 else None
    return kinds.get(type(prediction)) if getattr(prediction, "path", "") == "vp" else None


def sign(prediction: Prediction) -> int:
    """-1 where diffusers means the negative of the network's output."""
    return -1 if isinstance(prediction, EDM) or getattr(prediction, "reverse", False) else 1


def label_table(prediction: Prediction) -> TimestepTable | None:
    """The levels at labels 0, 1, 2, ...; None if labels do not count timesteps."""
    label = LABELS[prediction.label] if isinstance(prediction.label, str) else prediction.label
    if isinstance(label, TimestepTable):
        return label
    if label is not LABELS["flow"]:
        return None
    # Label 0 is sigma 0, which a table cannot hold; half a step stands there, below what schedulers visit by default.
    sigmas = [0.5 / STEPS, *(t / (STEPS - t) for t in range(1, STEPS))]
    return TimestepTable([1 / (1 + sigma * sigma) for sigma in sigmas], name="flow")
