"""``DistillModel``: the student that megatron trains, with a frozen teacher that nobody but this class sees."""

import copy
from dataclasses import dataclass, field

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from hylo_megatron.config import Architecture
from hylo_megatron.distill.ild import HiddenStates, layer_losses
from hylo_megatron.distill.kl import KLSettings, hidden_state_kl, token_weights
from hylo_megatron.layers.load import load_state, model_tensors


@dataclass(frozen=True)
class DistillSettings:
    stage: str  # "ild" | "distill"
    train: str = "all"  # "all" | "mixers": what is not copied from the base model
    normalize_ild: bool = True
    attention_weight: float = 1.0
    hidden_weight: float = 1.0
    kl: KLSettings = field(default_factory=KLSettings)


def is_mixer_parameter(name: str) -> bool:
    """Whether a parameter belongs to a new mixer (everything else was copied from the base model)."""
    return ".self_attention." in name or ".mixer." in name


def _reaches_recomputed_layers(module, inputs, embedded: Tensor) -> Tensor:
    """Of a frozen embedding: the engine's checkpoint of activations needs inputs with gradients."""
    return embedded.requires_grad_(torch.is_grad_enabled())


class DistillModel(MegatronModule):
    """Returns ``[loss, *parts]``; in ``distill``, on stages before the last, what the next one needs.

    There student and teacher states travel as one tensor, ``[S, B, D + C]``. The engine sizes its messages by
    ``config.hidden_size``, so this module's own config carries that sum. ``ild``: see teacher_fed.py.
    """

    def __init__(self, student, teacher, arch: Architecture, teacher_arch: Architecture, settings: DistillSettings):
        config = copy.copy(student.config)
        config.hidden_size = teacher_arch.hidden_size + arch.hidden_size
        super().__init__(config)
        self.teacher_width = teacher_arch.hidden_size
        self.vocab_size = min(arch.vocab_size, teacher_arch.vocab_size)  # beyond are rows that no token has
        self.student, self.settings, self.arch = student, settings, arch
        # In a plain list: unseen by DDP, the optimizer and checkpoints.
        self._frozen = [teacher.eval().requires_grad_(False)]
        self._states = HiddenStates(teacher.decoder) if settings.stage == "ild" else None
        for name in ("pre_process", "post_process", "share_embeddings_and_output_weights", "model_type", "vp_stage",
                     "pg_collection"):  # fmt: skip
            setattr(self, name, getattr(student, name, None))
        self.tp_group, self.cp_group = student.pg_collection.tp, student.pg_collection.cp
        first = student.decoder.layers[0].layer_number // 2
        norms = torch.tensor(arch.extra.get("ild_norms", [[1.0, 1.0]] * arch.num_layers), dtype=torch.float32)
        norms = norms if settings.normalize_ild else torch.ones_like(norms)
        self.first_layer, count = first, len(student.decoder.layers) // 2
        device = torch.cuda.current_device()
        self.norms_L2 = norms[first : first + count].clamp_min(1e-6).to(device)
        self.term_weights = torch.tensor([settings.attention_weight, settings.hidden_weight]).to(device)
        # Of this rank since the log last took them. Added to in place: a CUDA graph replays the addition.
        self.layer_sums, self.layer_tokens = torch.zeros_like(self.norms_L2), torch.zeros((), device=device)
        for name, parameter in student.named_parameters():
            # No layer's loss reaches embedding, last norm and head: in ild, weight decay would be all they get.
            reached = settings.stage == "distill" or ".layers." in name
            parameter.requires_grad_(reached and (settings.train == "all" or is_mixer_parameter(name)))
        if self.pre_process and settings.train == "mixers":
            student.embedding.register_forward_hook(_reaches_recomputed_layers)

    @property
    def teacher(self):
        return self._frozen[0]

    def shared_embedding_or_output_weight(self):
        return self.student.shared_embedding_or_output_weight()

    def set_input_tensor(self, input_tensor):
        x = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        if x is None:
            return
        width = self.arch.hidden_size
        self.student.set_input_tensor(x[..., :width].contiguous())
        self.teacher.set_input_tensor(x[..., width:].detach().contiguous())

    @staticmethod
    def _hidden(model, tokens, positions) -> Tensor:
        """The model's hidden states on this stage; after its final norm on the last."""
        last, model.post_process = model.post_process, False
        try:
            return model(tokens, positions, None)
        finally:
            model.post_process = last

    def _taught(self, length: int) -> int:
        """How many of the first tokens the teacher has to read. All of them where ranks or stages share sequences."""
        limit = self.settings.kl.teacher_length
        alone = self.cp_group.size() == 1 and self.config.pipeline_model_parallel_size == 1
        return min(length, limit) if limit and alone and self.settings.stage == "distill" else length

    def empty_hidden(self, batch: int, length: int) -> Tensor:
        """Room for the teacher's hidden states of ``length`` tokens, as a stage sends them (``ild``)."""
        length //= self.tp_group.size() if self.config.sequence_parallel else 1
        device = torch.cuda.current_device()
        return torch.empty(length, batch, self.teacher_width, dtype=self.config.pipeline_dtype, device=device)

    @torch.no_grad()
    def teach(self, tokens: Tensor, position_ids: Tensor, hidden: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """``ild``: what enters this stage's teacher layers and leaves each, and what leaves the stage.

        ``tokens``, ``position_ids`` ``[B, S]``; ``hidden`` ``[S, B, C]``: what left the stage before.
        """
        if hidden is not None:
            self.teacher.set_input_tensor(hidden)
        out = self._hidden(self.teacher, tokens, position_ids)
        return self._states.take(), out

    def forward(self, tokens: Tensor, position_ids: Tensor, labels: Tensor, loss_mask: Tensor,
                answer_weight: Tensor | None = None, teacher_states: list | None = None) -> Tensor:  # fmt: skip
        """All arguments ``[B, S]``; ``teacher_states``: from ``teach``, where that was called before (``ild``)."""
        if self.settings.stage == "ild":
            return self._forward_ild(teacher_states or self.teach(tokens, position_ids, None)[0], loss_mask)
        taught = self._taught(tokens.shape[1])
        with torch.no_grad():
            teacher_hidden = self._hidden(self.teacher, tokens[:, :taught], position_ids[:, :taught])
        hidden = self._hidden(self.student, tokens, position_ids)
        if not self.post_process:
            return torch.cat([hidden, teacher_hidden], -1)
        weights = token_weights(self.settings.kl, position_ids, loss_mask.float(), answer_weight)
        return self._head_loss(hidden, teacher_hidden, labels, loss_mask, *weights)

    def _forward_ild(self, teacher_states: list[Tensor], loss_mask: Tensor) -> Tensor:
        mask_SB = loss_mask.T.float()
        if self.config.sequence_parallel:
            mask_SB = mask_SB.chunk(self.tp_group.size())[self.tp_group.rank()]
        losses_L2 = layer_losses(self.student.decoder.layers, teacher_states, mask_SB, self.norms_L2)
        self._collect(losses_L2, mask_SB)
        loss = (losses_L2 * self.term_weights).sum()
        return torch.stack([loss, *losses_L2.detach().sum(0)])

    def _collect(self, losses_L2: Tensor, mask_SB: Tensor) -> None:
        sums, tokens = losses_L2.detach().clone(), mask_SB.sum()
        if self.config.sequence_parallel:
            torch.distributed.all_reduce(sums, group=self.tp_group)
            torch.distributed.all_reduce(tokens, group=self.tp_group)
        self.layer_sums += sums
        self.layer_tokens += tokens

    def take_layer_sums(self) -> tuple[Tensor, Tensor]:
        """``[L, 2]`` and the number of tokens they are of; begins anew."""
        taken = self.layer_sums.clone(), self.layer_tokens.clone()
        self.layer_sums.zero_(), self.layer_tokens.zero_()
        return taken

    def _head_loss(self, hidden: Tensor, teacher_hidden: Tensor, *per_token: Tensor) -> Tensor:
        """``[loss, kl, ce]``; ``per_token``: labels, mask, kl weight and ce weight, each ``[B, S]``."""
        if self.config.sequence_parallel:
            hidden, teacher_hidden = (
                gather_from_sequence_parallel_region(x, group=self.tp_group) for x in (hidden, teacher_hidden)
            )
        labels_T, mask_T, kl_weight_T, ce_weight_T = (x.T.flatten() for x in per_token)
        loss, kl, ce = hidden_state_kl(
            hidden.flatten(0, 1), self._head(self.student), teacher_hidden.flatten(0, 1), self._head(self.teacher),
            labels_T, mask_T.float(), kl_weight_T, ce_weight_T, self.vocab_size, self.tp_group,
            reduce_input_grad=not self.config.sequence_parallel, settings=self.settings.kl,
        )  # fmt: skip
        return torch.stack([loss, kl, ce])

    @staticmethod
    def _head(model) -> Tensor:
        if model.share_embeddings_and_output_weights:
            return model.shared_embedding_or_output_weight()
        return model.output_layer.weight

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The student's, under its own names: checkpoints of every stage look like a converted model."""
        return model_tensors(self.student.sharded_state_dict(prefix, sharded_offsets, metadata))

    def state_dict_for_save_checkpoint(self, prefix: str = "", keep_vars: bool = False):
        return self.student.state_dict(prefix=prefix, keep_vars=keep_vars)

    def load_state_dict(self, state_dict, strict: bool = True):
        load_state(self.student, state_dict)
