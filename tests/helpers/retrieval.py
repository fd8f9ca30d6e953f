"""Syllables to make words of, and a chat template."""

SYLLABLES = ("ba", "ker", "lo", "min", "tas", "ru", "ven", "sil", "dor", "fe", "gan", "pi")
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe yourself<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
