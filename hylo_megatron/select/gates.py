"""``--method gates``: every layer has both mixers, and gates between them are trained under a budget.

A layer's output is ``gate * attention + (1 - gate) * linear``. A gate is ``sigmoid(logit - price)``. One price for all
layers keeps the sum of the gates at the budget, which shrinks from half of the layers to the number of MLA layers;
everything else is frozen. So layers compete for the budget, and no weight of a penalty needs tuning.

Legend: L layers, B rows, S tokens of a row, D model.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hylo_megatron.errors import HyLoError
from hylo_megatron.files import write_json
from hylo_megatron.json_file import read_json
from hylo_megatron.select.judge import answer_losses
from hylo_megatron.select.models import Pair
from hylo_megatron.select.ranking import Ranking, Score, by_score
from hylo_megatron.select.ranks import Ranks
from hylo_megatron.select.rows import Rows
from hylo_megatron.select.training import Training, mean_divergence

SAVE_EVERY = 20  # steps
SHRINKS = 2 / 3  # share of the steps in which the budget shrinks
LOGIT_LIMIT = 30.0  # no price is needed beyond it: sigmoid(30) is 1 in fp32


class GatedMixer(nn.Module):
    """Both mixers of a layer, each behind its own norm. ``gates``: a list whose item is the tensor of all gates."""

    def __init__(self, number: int, attention: tuple, linear: tuple, gates: list[Tensor]):
        super().__init__()
        self.number, self.gates = number, gates
        self.norm_a, self.attention = attention
        self.norm_l, self.linear = linear

    def forward(self, x_BSD: Tensor, *beside) -> Tensor:
        gate = self.gates[0][self.number].to(x_BSD.dtype)
        return gate * self.attention(self.norm_a(x_BSD)) + (1 - gate) * self.linear(self.norm_l(x_BSD), *beside)


def gated(pair: Pair, gates: list[Tensor]) -> contextlib.AbstractContextManager[nn.Module]:
    """Return a context of the student with a ``GatedMixer`` in each layer."""
    mixers = (GatedMixer(layer, pair.attention(layer), pair.linear(layer), gates) for layer in range(pair.num_layers))
    return pair.replaced({mixer.number: (nn.Identity(), mixer) for mixer in mixers})


def gates_of(logits_L: Tensor, budget: float) -> Tensor:
    """Return gates that sum to ``budget``: sigmoids of the logits less the price that makes them do so."""
    with torch.no_grad():
        low, high = logits_L.min() - LOGIT_LIMIT, logits_L.max() + LOGIT_LIMIT
        for _ in range(60):
            price = (low + high) / 2
            above = (logits_L - price).sigmoid().sum() > budget
            low, high = torch.where(above, price, low), torch.where(above, high, price)
    gates_L = (logits_L - price).sigmoid()
    slope_L = (gates_L * (1 - gates_L)).detach()
    # A Newton step from the solution: it changes no value, and carries the price's gradient.
    price = price + (gates_L.sum() - gates_L.sum().detach()) / slope_L.sum()
    return (logits_L - price).sigmoid()


@dataclass
class GateState:
    """The gates' logits with their optimizer, which a file keeps between runs."""

    path: Path
    logits_L: nn.Parameter
    optimizer: torch.optim.Adam
    step: int = 0

    @classmethod
    def begin(cls, path: Path, num_layers: int, lr: float) -> "GateState":
        logits_L = nn.Parameter(torch.zeros(num_layers))
        return cls(path, logits_L, torch.optim.Adam([logits_L], lr=lr))

    def load(self) -> None:
        if not self.path.is_file():
            return
        saved = read_json(self.path, dict[str, list[float]], "remove the file to train the gates again")
        self.logits_L.data = torch.tensor(saved["logits"])
        self.step = int(saved["step"][0])
        moments = {name: torch.tensor(saved[name]) for name in ("exp_avg", "exp_avg_sq")}
        state = {"state": {0: {"step": torch.tensor(float(self.step)), **moments}}}
        self.optimizer.load_state_dict(self.optimizer.state_dict() | state)

    def save(self) -> None:
        moments = self.optimizer.state[self.logits_L]
        saved = {name: moments[name].tolist() for name in ("exp_avg", "exp_avg_sq")}
        write_json(self.path, {"step": [self.step], "logits": self.logits_L.tolist(), **saved})


@dataclass(frozen=True, kw_only=True)
class GateTraining:
    """One training of gates. ``score`` divides the losses as the scores of other methods are divided.

    ``rows``: what the training reads, other rows than those of ``score``.
    """

    pair: Pair
    training: Training
    rows: Rows
    score: Score
    count: int

    def budget(self, step: int) -> float:
        """Return the sum of the gates at a step."""
        start = max(self.count, self.pair.num_layers / 2)
        passed = min(1.0, step / (SHRINKS * self.training.steps))
        return start + (self.count - start) * passed

    def loss(self, student: nn.Module, step: int, ranks: Ranks) -> Tensor:
        """Return this rank's loss at a step, with a graph. The mean over ranks is the loss over all rows."""
        score, device = self.score, student.device
        mine = ranks.share(self.training.rows(step, len(self.rows.text_BS)))
        loss = torch.zeros((), device=device)
        if score.weight < 1:
            ids_BS = self.rows.text_BS[mine].to(device)
            loss = loss + (1 - score.weight) * mean_divergence(self.pair.teacher, student, ids_BS) / score.base.kl
        if score.weight:
            numbers = self.training.rows(step, len(self.rows.samples_BS))
            mine, count = ranks.share(numbers), self.rows.answers_BS[numbers, 1:].sum().item()
            ids_BS, answers_BS = (rows[mine].to(device) for rows in (self.rows.samples_BS, self.rows.answers_BS))
            answers = answer_losses(student, ids_BS, answers_BS) * ranks.size / count
            loss = loss + score.weight * answers / (score.base.answer_loss - score.teacher)
        return loss

    def __call__(self, state: GateState, ranks: Ranks, log=print) -> Ranking:
        """Train from the step that ``state`` has reached to the last one, and rank layers by their gates."""
        if self.training.batch % ranks.size:
            raise HyLoError(f"--train-batch {self.training.batch}: expected a multiple of the {ranks.size} ranks")
        state.load()
        gates: list[Tensor] = [state.logits_L]
        with gated(self.pair, gates) as student:
            while state.step < self.training.steps:
                budget = self.budget(state.step)
                gates[0] = gates_of(state.logits_L, budget).to(student.device)
                loss = self.loss(student, state.step, ranks)
                loss.backward()
                if ranks.size > 1:
                    dist.all_reduce(state.logits_L.grad)
                    state.logits_L.grad /= ranks.size
                state.optimizer.step()
                state.optimizer.zero_grad()
                state.step += 1
                if ranks.first and (state.step % SAVE_EVERY == 0 or state.step == self.training.steps):
                    state.save()
                    log(f"gates: step {state.step}/{self.training.steps}, budget {budget:.1f}, loss {loss.item():.4f}")
        with torch.no_grad():
            scores = dict(enumerate(gates_of(state.logits_L, self.count).tolist()))
        return Ranking(order=by_score(scores), scores=scores)
