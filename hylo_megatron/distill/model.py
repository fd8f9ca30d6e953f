"""``DistillModel``: the student that megatron trains, with a frozen teacher that only this class sees.

Legend: S sequence, B batch, D student width, C teacher width, L layers of this rank, P parts of a layer's loss,
T tokens (``S * B``).
"""

import copy

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from hylo_megatron.config import Architecture
from hylo_megatron.config.decisions import taught_length
from hylo_megatron.distill.head import HeadInputs
from hylo_megatron.distill.host_memory import stream_layers
from hylo_megatron.distill.ild import HiddenStates
from hylo_megatron.distill.losses.hidden import hidden_distance, shared_gradient
from hylo_megatron.distill.payload import Payload
from hylo_megatron.distill.settings import DistillSettings
from hylo_megatron.layers.load import load_state, model_tensors
from hylo_megatron.mixers.initial_states import InitialStates
from hylo_megatron.mixers.megatron_linear import LinearMixer
from hylo_megatron.planner.flops import TokenFlops, token_flops


def _give_gradient(module, inputs, embedded: Tensor) -> Tensor:
    """Let a frozen embedding's output require a gradient: megatron recomputes layers only if their input does."""
    return embedded.requires_grad_(torch.is_grad_enabled())


class DistillModel(MegatronModule):
    """Returns ``[loss, *parts]``, or on pipeline stages before the last the ``Payload`` for the next stage.

    In a layer-wise kind of stage every pipeline stage has its own loss; ``parallel/teacher_fed.py`` sends the
    teacher's states from stage to stage.
    """

    def __init__(self, student, teacher, arch: Architecture, teacher_arch: Architecture, settings: DistillSettings):
        payload = Payload(student_width=arch.hidden_size, teacher_width=teacher_arch.hidden_size)
        config = copy.copy(student.config)
        config.hidden_size = payload.width
        super().__init__(config)
        self.payload = payload
        self.vocab_size = min(arch.vocab_size, teacher_arch.vocab_size)  # no token has the rows beyond
        self.student, self.settings, self.arch, self.teacher_arch = student, settings, arch, teacher_arch
        # In a plain list, so that DDP, the optimizer and checkpoints do not find the teacher.
        self._frozen = [teacher.eval().requires_grad_(False)]
        if settings.offload_teacher:
            stream_layers(teacher)
        for name in ("pre_process", "post_process", "share_embeddings_and_output_weights", "model_type", "vp_stage",
                     "pg_collection"):  # fmt: skip
            setattr(self, name, getattr(student, name, None))
        self.tp_group, self.cp_group = student.pg_collection.tp, student.pg_collection.cp
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(settings.kind.trains(name, settings.train))
        if self.pre_process and settings.train == "mixers":
            student.embedding.register_forward_hook(_give_gradient)
        self._initial_states = self._start_from(settings) if settings.initial_states != "zero" else {}
        for block in self._linear_blocks() if settings.recurrence_block else ():
            block.cut_recurrence(settings.recurrence_block)
        self.late = None  # see ``KL.token_weights``
        if settings.kind.layerwise:
            self._prepare_layers()
        else:
            self._prepare_head()

    def _prepare_layers(self) -> None:
        """Tensors of a layer-wise loss are made once, on the device: a CUDA graph reads and adds to them in place."""
        loss, layers, device = self.settings.loss, self.student.decoder.layers, torch.cuda.current_device()
        self._states = HiddenStates(self.teacher.decoder)
        self.first_layer = layers[0].layer_number // 2
        here = slice(self.first_layer, self.first_layer + len(layers) // 2)
        norms_LP = torch.tensor(loss.norms(self.arch), dtype=torch.float32)
        self.norms_LP = norms_LP[here].clamp_min(1e-6).to(device)
        self.weights_P = torch.tensor(loss.weights).to(device)
        self.layer_sums_LP = torch.zeros_like(self.norms_LP)  # since the log took them
        self.layer_tokens = torch.zeros((), device=device)

    def _start_from(self, settings: DistillSettings) -> dict[str, InitialStates]:
        """Return the initial states of each linear block, by the number of its layer, which no other chunk has."""
        first = (settings.seed * torch.distributed.get_world_size() + torch.distributed.get_rank()) * 1000
        mode = settings.initial_states
        return {
            str(block.layer_number): block.start_from(mode, first + block.layer_number)
            for block in self._linear_blocks()
        }

    def _linear_blocks(self) -> list[LinearMixer]:
        return [module for module in self.student.modules() if isinstance(module, LinearMixer)]

    def _prepare_head(self) -> None:
        loss = self.settings.loss
        if loss.ce_from:
            self.late = torch.zeros((), device=torch.cuda.current_device())
        stacks = (self.student.decoder, self.teacher.decoder) if loss.hidden_layers_weight else ()
        self._both_states = [HiddenStates(stack) for stack in stacks]

    def token_flops(self, length: int) -> TokenFlops:
        """Return the FLOPs of a token in sequences of ``length``."""
        settings = self.settings
        taught = self._taught(length) if not settings.kind.layerwise else length
        return token_flops(self.arch, self.teacher_arch, settings.kind, train=settings.train, length=length,
                           taught=taught)  # fmt: skip

    def forget_states(self) -> None:
        """Start the next step from zero states, since the guard has left out this one."""
        for states in self._initial_states.values():
            states.forget()

    def initial_states(self) -> dict[str, Tensor]:
        """Return what the states that the next step starts from are made of, by the number of their layer."""
        return {name: states.final for name, states in self._initial_states.items() if states.final is not None}

    def set_initial_states(self, found: dict[str, Tensor]) -> None:
        """Let the next step start as after ``initial_states`` returned ``found``."""
        for name, states in self._initial_states.items():
            states.restore(found[name].to(torch.cuda.current_device()))

    def begin_step(self, step: int, steps: int) -> bool:
        """Set what depends on the number of the step, counted from 0; a CUDA graph reads the value in place.

        Returns a value that changes where the loss gets other weights.
        """
        for states in self._initial_states.values():
            states.begin_step(step)
        late = self.late is not None and self.settings.loss.late_at(step, steps)
        if self.late is not None:
            self.late.fill_(float(late))
        return late

    @property
    def teacher(self):
        return self._frozen[0]

    def shared_embedding_or_output_weight(self):
        return self.student.shared_embedding_or_output_weight()

    def set_input_tensor(self, input_tensor):
        packed = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        if packed is None:
            return
        student_SBD, teacher_SBC = self.payload.unpack(packed)
        self.student.set_input_tensor(student_SBD)
        self.teacher.set_input_tensor(teacher_SBC)

    @staticmethod
    def _hidden(model, tokens_BS: Tensor, positions_BS: Tensor) -> Tensor:
        """Return the model's hidden states on this pipeline stage; on the last stage, after the final norm."""
        last, model.post_process = model.post_process, False
        try:
            return model(tokens_BS, positions_BS, None)
        finally:
            model.post_process = last

    def _taught(self, length: int) -> int:
        shared = self.cp_group.size() > 1 or self.config.pipeline_model_parallel_size > 1
        return taught_length(length, self.settings.loss.teacher_reads, shared)

    def forward(self, tokens: Tensor, position_ids: Tensor, labels: Tensor, loss_mask: Tensor,
                answer_weight: Tensor | None = None, teacher_states: list | None = None) -> Tensor:  # fmt: skip
        """All tensors are ``[B, S]``; ``teacher_states`` are what ``teach`` returned, if it was called before."""
        if self.settings.kind.layerwise:
            return self._layer_loss(teacher_states or self.teach(tokens, position_ids, None)[0], loss_mask)
        taught = self._taught(tokens.shape[1])
        with torch.no_grad():
            teacher_SBC = self._hidden(self.teacher, tokens[:, :taught], position_ids[:, :taught])
        student_SBD = self._hidden(self.student, tokens, position_ids)
        if not self.post_process:
            return self.payload.pack(student_SBD, teacher_SBC)
        return self._head_loss(student_SBD, teacher_SBC, labels, loss_mask, position_ids, answer_weight)

    # ---- layer by layer ----

    def empty_hidden(self, batch: int, length: int) -> Tensor:
        """Return room for the hidden states ``[S, B, C]`` that the stage before sends for ``length`` tokens."""
        length //= self.tp_group.size() if self.config.sequence_parallel else 1
        shape = (length, batch, self.payload.teacher_width)
        return torch.empty(shape, dtype=self.config.pipeline_dtype, device=torch.cuda.current_device())

    @torch.no_grad()
    def teach(self, tokens_BS: Tensor, positions_BS: Tensor, hidden_SBC: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """Return the states around this pipeline stage's teacher layers, and the state for the next stage.

        ``hidden_SBC`` is what the stage before has sent.
        """
        if hidden_SBC is not None:
            self.teacher.set_input_tensor(hidden_SBC)
        out_SBC = self._hidden(self.teacher, tokens_BS, positions_BS)
        return self._states.take(), out_SBC

    def _layer_loss(self, teacher_states: list[Tensor], mask_BS: Tensor) -> Tensor:
        mask_SB = mask_BS.T.float()
        if self.config.sequence_parallel:
            mask_SB = mask_SB.chunk(self.tp_group.size())[self.tp_group.rank()]
        losses_LP = self.settings.loss(self.student.decoder.layers, teacher_states, mask_SB, self.norms_LP)
        if self.training:  # an evaluation's losses are no part of the next step's
            self._collect(losses_LP, mask_SB)
        loss = (losses_LP * self.weights_P).sum()
        return torch.stack([loss, *losses_LP.detach().sum(0)])

    def _collect(self, losses_LP: Tensor, mask_SB: Tensor) -> None:
        sums_LP, tokens = losses_LP.detach().clone(), mask_SB.sum()
        if self.config.sequence_parallel:
            torch.distributed.all_reduce(sums_LP, group=self.tp_group)
            torch.distributed.all_reduce(tokens, group=self.tp_group)
        self.layer_sums_LP += sums_LP
        self.layer_tokens += tokens

    def take_layer_sums(self) -> tuple[Tensor, Tensor]:
        """Return the losses ``[L, P]`` summed since the last call, and the number of tokens they are sums over."""
        taken = self.layer_sums_LP.clone(), self.layer_tokens.clone()
        self.layer_sums_LP.zero_()
        self.layer_tokens.zero_()
        return taken

    # ---- end to end ----

    def _head_loss(self, student_SBD: Tensor, teacher_SBC: Tensor, labels_BS: Tensor, mask_BS: Tensor,
                   positions_BS: Tensor, answer_weight_BS: Tensor | None) -> Tensor:  # fmt: skip
        student_SBD, teacher_SBC = self._gathered(student_SBD), self._gathered(teacher_SBC)
        inputs = HeadInputs(
            h_TD=student_SBD.flatten(0, 1), head_ND=self._head(self.student),
            t_TC=teacher_SBC.flatten(0, 1), teacher_head_NC=self._head(self.teacher),
            labels_T=labels_BS.T.flatten(), mask_T=mask_BS.T.flatten(), position_T=positions_BS.T.flatten(),
            answer_weight_T=None if answer_weight_BS is None else answer_weight_BS.T.flatten(),
            vocab_size=self.vocab_size, group=self.tp_group, reduce_input_grad=not self.config.sequence_parallel,
            late=self.late,
        )  # fmt: skip
        parts = self.settings.loss(inputs)
        if not self.settings.loss.distances:
            return parts
        return self._with_distances(parts, student_SBD, teacher_SBC, self._taught_mask(mask_BS, positions_BS))

    def _gathered(self, x_SBD: Tensor) -> Tensor:
        """Return the states of all tokens of this context-parallel rank."""
        return (
            gather_from_sequence_parallel_region(x_SBD, group=self.tp_group)
            if self.config.sequence_parallel
            else x_SBD
        )

    def _taught_mask(self, mask_BS: Tensor, positions_BS: Tensor) -> Tensor:
        limit = self.settings.loss.teacher_reads
        return (mask_BS if limit is None else mask_BS * (positions_BS < limit)).T.float()

    def _with_distances(self, parts: Tensor, student_SBD: Tensor, teacher_SBC: Tensor, mask_SB: Tensor) -> Tensor:
        """Add the distances between hidden states to the loss, and append them to its parts."""
        weights, ranks = self.settings.loss.distances, self.tp_group.size() if self.config.sequence_parallel else 1
        found = {"hidden": hidden_distance(student_SBD, teacher_SBC, mask_SB)} if "hidden" in weights else {}
        if "hidden layers" in weights:
            student, teacher = (states.take()[2::2] for states in self._both_states)  # after each layer's MLP
            pairs = [map(self._gathered, pair) for pair in zip(student, teacher, strict=True)]
            found["hidden layers"] = sum(hidden_distance(*pair, mask_SB) for pair in pairs)
        loss = parts[0] + sum(weights[name] * shared_gradient(value, ranks) for name, value in found.items())
        return torch.stack([loss, *parts[1:], *(value.detach() for value in found.values())])

    @staticmethod
    def _head(model) -> Tensor:
        if model.share_embeddings_and_output_weights:
            return model.shared_embedding_or_output_weight()
        return model.output_layer.weight

    # ---- checkpoints ----

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Return the student's tensors under its own names: checkpoints of every stage look like a converted model."""
        return model_tensors(self.student.sharded_state_dict(prefix, sharded_offsets, metadata))

    def state_dict_for_save_checkpoint(self, prefix: str = "", keep_vars: bool = False):
        return self.student.state_dict(prefix=prefix, keep_vars=keep_vars)

    def load_state_dict(self, state_dict, strict: bool = True):
        load_state(self.student, state_dict)
