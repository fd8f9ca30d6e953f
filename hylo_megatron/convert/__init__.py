"""HF checkpoint <-> Megatron distributed checkpoint: declarative tables, streamed tensor by tensor."""
