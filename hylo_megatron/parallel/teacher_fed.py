"""Pipeline schedule of layer-wise distillation: no gradient crosses pipeline stages, and no stage waits for one.

Stages send the teacher's hidden states; the loss of a stage stays on that stage. The teacher of stage p reads
``stages - 1 - p`` micro-batches ahead of the student. So in each time slot all stages train on the same micro-batch,
and the state that a stage's teacher needs has left the stage before it one slot earlier. The pipeline fills once in a
run. megatron's 1F1B fills and drains in every step, and sends back gradients, which would be zeros here.

Legend: S sequence, B batch, C teacher width.
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


@dataclass(frozen=True, kw_only=True)
class _Coming:
    """The next micro-batch of a pipeline stage; ``batch`` is None at the end of the data."""

    batch: dict[str, Tensor] | None
    hidden_SBC: Tensor | None  # from the previous stage; complete when ``works`` are done
    works: list
    outgoing_SBC: Tensor | None  # kept until the message is sent


class TeacherAhead:
    """Micro-batches with the teacher's states of this pipeline stage, in order. The teacher reads ahead."""

    def __init__(self, model, iterator, group):
        self.model, self.iterator, self.group = model, iterator, group
        ranks = dist.get_process_group_ranks(group)
        pp_rank, self.ahead = group.rank(), group.size() - 1 - group.rank()
        self.before = ranks[pp_rank - 1] if pp_rank else None
        self.after = ranks[pp_rank + 1] if self.ahead else None
        self.ready: deque = deque()
        self.coming = self._request(None)

    def _request(self, outgoing_SBC: Tensor | None) -> _Coming:
        """Send the teacher's state to the next stage, and request the next micro-batch's from the previous stage."""
        batch, hidden_SBC, operations = next_batch(self.iterator, None), None, []
        if self.after is not None and outgoing_SBC is not None:
            operations.append(dist.P2POp(dist.isend, outgoing_SBC, self.after, self.group))
        if self.before is not None and batch is not None:
            hidden_SBC = self.model.empty_hidden(*batch["tokens"].shape)
            operations.append(dist.P2POp(dist.irecv, hidden_SBC, self.before, self.group))
        works = dist.batch_isend_irecv(operations) if operations else []
        return _Coming(batch=batch, hidden_SBC=hidden_SBC, works=works, outgoing_SBC=outgoing_SBC)

    def _teach(self) -> None:
        for work in self.coming.works:
            work.wait()
        batch = self.coming.batch
        states, hidden_SBC = self.model.teach(batch["tokens"], batch["position_ids"], self.coming.hidden_SBC)
        self.ready.append((batch, states))
        self.coming = self._request(hidden_SBC.contiguous())

    def take(self) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Return the next micro-batch and its teacher states."""
        while len(self.ready) <= self.ahead and self.coming.batch is not None:
            self._teach()
        return self.ready.popleft()


class TeacherFed:
    """A schedule with the signature of megatron's. One object serves a whole run: the teacher reads across steps."""

    def __init__(self):
        self.feed: TeacherAhead | None = None

    def _feed(self, model, iterator, limit: int | None) -> TeacherAhead:
        """Return the micro-batches of a step, or the first ``limit`` of an evaluation, so that no more are read."""
        inner = get_attr_wrapped_model(model, "teach", return_model_obj=True)
        group = parallel_state.get_pipeline_model_parallel_group()
        if limit is not None:
            return TeacherAhead(inner, islice(iterator, limit), group)
        if self.feed is None or self.feed.iterator is not iterator:
            self.feed = TeacherAhead(inner, iterator, group)
        return self.feed

    def __call__(self, *, model, data_iterator, num_microbatches, forward_only=False, pg_collection=None,
                 force_all_reduce=False, **_):  # fmt: skip
        """Run a step. Return what to log for each micro-batch; megatron reads it on the last pipeline stage only.

        The guard of a training adds up the losses of all stages.
        """
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
        return logged
