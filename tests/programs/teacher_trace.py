"""What each pipeline stage does in layer-wise distillation, in which order: torchrun this_file.py WORK STAGES

Rank 0 prints one JSON line: by stage, the order of its events and to which stages it sent.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from helpers import train as helpers
from megatron.core import parallel_state
from programs import parity

from hylo_megatron.parallel import teacher_fed

STEPS = 3


def main(work: Path) -> None:
    folders = (str(work / "student"), str(work / "teacher"))
    model, wrapped, _ = parity.build(parity.Cell("trace", *folders, "ild", "all", pp=int(sys.argv[2]), micro=1))
    events, receivers = [], set()
    teach, learn, send = teacher_fed.TeacherAhead._teach, teacher_fed.learn, dist.batch_isend_irecv

    def note_teaching(self):
        events.append(["teach", sum(kind == "teach" for kind, _ in events)])
        teach(self)

    def note_learning(*arguments):
        events.append(["learn", sum(kind == "learn" for kind, _ in events)])
        return learn(*arguments)

    def note_sending(operations):
        receivers.update(op.peer for op in operations if op.op is dist.isend)
        return send(operations)

    teacher_fed.TeacherAhead._teach, teacher_fed.learn, dist.batch_isend_irecv = (
        note_teaching, note_learning, note_sending
    )  # fmt: skip
    schedule, rows = teacher_fed.TeacherFed(), parity.sample_rows(0, 1, 1)
    for step in range(STEPS):
        schedule(model=[wrapped], data_iterator=rows, num_microbatches=parity.ROWS)
        events.append(["step", step])
    stage = parallel_state.get_pipeline_model_parallel_rank()
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, {"stage": stage, "events": events, "receivers": sorted(receivers)})
    if dist.get_rank() == 0:
        print(json.dumps(everyone), flush=True)
    helpers.end_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
