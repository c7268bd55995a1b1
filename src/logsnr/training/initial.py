"""Where a training begins: at weights drawn at random, or at those of another model.

A fine-tuned run begins as the model it comes from, answer for answer: same network, prediction and sigma_data.  Where
its classes are others, each begins as that model's null condition.
"""

from __future__ import annotations

from logsnr import zoo
from logsnr.denoiser import NetworkDenoiser
from logsnr.errors import LogsnrError
from logsnr.models import Network, load_denoiser
from logsnr.paths import expanded
from logsnr.predictions import EDM, Prediction
from logsnr.training.config import Recipe


def initial_model(recipe: Recipe, shape: tuple[int, ...]) -> NetworkDenoiser | None:
    """The model that a recipe begins from, None where it names none.

    Raises:
        LogsnrError: if there is none, or it makes samples of another shape than the data's.
    """
    source = recipe.init_from
    if source is None:
        return None
    model = load_denoiser(zoo.folder(source) if source.startswith(zoo.PREFIX) else expanded(source))
    if tuple(model.shape) != tuple(shape):
        raise LogsnrError(
            f"init_from = {source!r} makes samples of {tuple(model.shape)}, the data are {tuple(shape)}: resize the "
            "data (data.size, data.channels), or begin from another model"
        )
    return model


def settled(recipe: Recipe, model: NetworkDenoiser | None) -> Recipe:
    """The recipe with the model's sigma_data where it has none of its own: by that the network scales its input."""
    if model is None or recipe.sigma_data is not None:
        return recipe
    return recipe.model_copy(update={"sigma_data": model.sigma_data})


def begin_from(model: NetworkDenoiser, network: Network, prediction: Prediction, source: str | None) -> None:
    """Copy the model's weights into a network that is trained for `prediction`.

    Raises:
        LogsnrError: if they mean something else there, naming what to set.
    """
    assert isinstance(model.network, Network)
    mine, theirs = (n.config.model_dump(mode="json", exclude={"classes"}) for n in (network, model.network))
    differ = [key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)]
    if differ:
        told = ", ".join(f"network.{key}: {theirs.get(key)}" for key in sorted(differ))
        raise LogsnrError(f"init_from = {source!r} is another network than the recipe's: set {told}")
    if prediction != model.prediction:
        raise LogsnrError(
            f"init_from = {source!r} predicts {_told(model.prediction)}, the recipe {_told(prediction)}: set "
            "prediction as the model has it, and leave sigma_data out"
        )
    network.begin_as(model.network)


def _told(prediction: Prediction) -> str:
    more = f", sigma_data {prediction.sigma_data:.4g}" if isinstance(prediction, EDM) else ""
    path = getattr(prediction, "path", None)
    return f"{prediction.name} (label {prediction.label}{f', path {path}' if path else ''}{more})"
