"""``StageKind``: what one kind of training stage trains, what it needs of the teacher and how it is scheduled.

To add a kind of stage, add an entry to ``STAGE_KINDS``; name its loss there (``distill/losses/``). Everything else
asks the entry. No torch in here.
"""

from dataclasses import dataclass

from hylo_megatron.config.decisions import is_new
from hylo_megatron.errors import HyLoError

TRAIN = ("all", "mixers")  # choices of --hylo-train; mixers: what was copied from the base model stays frozen


@dataclass(frozen=True, kw_only=True)
class StageKind:
    """One value of ``--hylo-stage``.

    ``loss`` names the loss in the registry of losses, ``train`` the default of ``--hylo-train``. Where ``layerwise``
    is set, each layer of the student reads the teacher's hidden state and is trained apart from the other layers.
    Then the teacher has to be the base model, no gradient crosses layers or pipeline stages
    (``parallel/teacher_fed.py``), embedding, final norm and head get no gradient, no layer is recomputed, and the log
    has a loss for each layer.
    """

    name: str
    help: str
    loss: str
    train: str
    layerwise: bool = False

    def trains(self, name: str, train: str) -> bool:
        """Whether the parameter ``name`` is trained. ``train``: one of ``TRAIN``."""
        reached = not self.layerwise or ".layers." in name  # weight decay would be all that the others get
        return reached and (train == "all" or is_new(name))


_KINDS = (
    StageKind(name="ild", help="layer by layer", loss="ild", train="mixers", layerwise=True),
    StageKind(name="distill", help="end to end", loss="kl", train="all"),
)
STAGE_KINDS: dict[str, StageKind] = {kind.name: kind for kind in _KINDS}


def stage_kind(name: str) -> StageKind:
    """Return the kind of that name. Raises ``HyLoError`` for an unknown one."""
    if name not in STAGE_KINDS:
        raise HyLoError(f"kind of stage {name!r}: expected one of {', '.join(STAGE_KINDS)}")
    return STAGE_KINDS[name]
