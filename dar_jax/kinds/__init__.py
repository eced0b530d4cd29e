"""The kinds of models. A new one is a module beside these and a line here."""

from dar_jax.kinds.base import Kind
from dar_jax.kinds.dar_distilled import DarDistilled
from dar_jax.kinds.dar_prior import DarPrior
from dar_jax.kinds.dar_reward import DarReward
from dar_jax.kinds.dar_tokenizer import DarTokenizer
from dar_jax.kinds.kl_vae import KlVaeKind
from dar_jax.kinds.transdiff import TransDiffKind

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        DarTokenizer(),
        DarPrior(),
        DarDistilled(),
        DarReward(),
        KlVaeKind(),
        TransDiffKind(),
    )
}


def find_kind(name: str, where: str) -> Kind:
    """Return the kind of a name.

    Args:
        name: as in `config.task` and in a model directory's `config.json`.
        where: it stands, for the message.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(f"{where}: unknown kind {name!r} must be one of {', '.join(KINDS)}")
    return KINDS[name]
