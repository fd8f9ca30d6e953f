"""Pipeline schedule of layer-wise distillation: no gradient crosses stages, and nobody waits for one.

What goes down the pipeline is the teacher's hidden states; a stage's loss stays on that stage. So the teacher of stage
p reads ``stages - 1 - p`` micro-batches ahead of the one that the student learns from: in each slot all stages learn
from the same micro-batch, and what a stage's teacher needs left the stage before it one slot ago. The pipeline fills
once in a run; the engine's 1F1B fills and drains at every step, and sends back gradients that would be zeros here.
"""

import contextlib
from collections import deque
from dataclasses import dataclass
from itertools import islice

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch import Tensor

from hylo_megatron.distill.batches import learn, next_batch


@dataclass
class _Coming:
    """The next micro-batch of a stage: None where the data has ended."""

    batch: dict[str, Tensor] | None
    hidden: Tensor | None  # what the stage before sends; filled when ``works`` are done
    works: list
    outgoing: Tensor | None  # kept until it is sent


class TeacherAhead:
    """Micro-batches with the teacher's states of this stage, in order; the teacher reads ahead of who takes them."""

    def __init__(self, model, iterator, group):
        self.model, self.iterator, self.group = model, iterator, group
        ranks = dist.get_process_group_ranks(group)
        stage, self.ahead = group.rank(), group.size() - 1 - group.rank()
        self.before = ranks[stage - 1] if stage else None
        self.after = ranks[stage + 1] if self.ahead else None
        self.ready: deque = deque()
        self.coming = self._request(None)

    def _request(self, outgoing: Tensor | None) -> _Coming:
        """Sends on what the teacher made, and asks for what its next micro-batch needs."""
        batch, hidden, operations = next_batch(self.iterator, None), None, []
        if self.after is not None and outgoing is not None:
            operations.append(dist.P2POp(dist.isend, outgoing, self.after, self.group))
        if self.before is not None and batch is not None:
            hidden = self.model.empty_hidden(*batch["tokens"].shape)
            operations.append(dist.P2POp(dist.irecv, hidden, self.before, self.group))
        return _Coming(batch, hidden, dist.batch_isend_irecv(operations) if operations else [], outgoing)

    def _teach(self) -> None:
        for work in self.coming.works:
            work.wait()
        batch = self.coming.batch
        states, hidden = self.model.teach(batch["tokens"], batch["position_ids"], self.coming.hidden)
        self.ready.append((batch, states))
        self.coming = self._request(hidden.contiguous())

    def take(self) -> tuple[dict[str, Tensor], list[Tensor]]:
        while len(self.ready) <= self.ahead and self.coming.batch is not None:
            self._teach()
        return self.ready.popleft()


class TeacherFed:
    """Called as the engine's schedules are; one for a whole run, since the teacher reads across steps."""

    def __init__(self):
        self.feed: TeacherAhead | None = None

    def _feed(self, model, iterator, limit: int | None) -> TeacherAhead:
        """``limit``: an evaluation, which ends with its own micro-batches."""
        inner = get_attr_wrapped_model(model, "teach", return_model_obj=True)
        group = parallel_state.get_pipeline_model_parallel_group()
        if limit is not None:
            return TeacherAhead(inner, islice(iterator, limit), group)
        if self.feed is None or self.feed.iterator is not iterator:
            self.feed = TeacherAhead(inner, iterator, group)
        return self.feed

    def __call__(self, *, model, data_iterator, num_microbatches, forward_only=False, pg_collection=None,
                 force_all_reduce=False, **_):  # fmt: skip
        """Sums to log for each micro-batch, on the last stage."""
        model, iterator = (x[0] if isinstance(x, list) else x for x in (model, data_iterator))
        config, logged, tokens = get_model_config(model), [], 0
        feed = self._feed(model, iterator, num_microbatches if forward_only else None)
        for left in reversed(range(num_microbatches)):
            batch, states = feed.take()
            reduce_later = config.no_sync_func() if left and config.no_sync_func else contextlib.nullcontext()
            with reduce_later, torch.set_grad_enabled(not forward_only):
                output, loss_function = learn(batch, model, states)
                loss, count, sums = loss_function(output)
                if not forward_only:
                    (config.grad_scale_func(loss) if config.grad_scale_func else loss).backward()
            logged.append(sums)
            tokens = tokens + count
        if config.finalize_model_grads_func and not forward_only:
            config.finalize_model_grads_func(
                [model], tokens, pg_collection=pg_collection, force_all_reduce=force_all_reduce
            )
        return [] if feed.ahead else logged
