"""Chat templates in the shapes of well-known models, with tokenizers that know their special tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from prism_trt.target.tokenizer import Tokenizer, TokenizerSettings
from tests.tiny import TEXT

SPECIAL = (
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)


@dataclass(frozen=True)
class Shape:
    """A template, the token that ends its turns, and its kind of tokenizer."""

    template: str
    eos: str
    bos: str | None = None
    metaspace: bool = False
    """Spaces belong to the word after them, as in SentencePiece; else byte level."""
    system: bool = True
    """The template takes a system message."""

    def tokenizer(self) -> Tokenizer:
        fast = fast_tokenizer(self.metaspace)
        settings = TokenizerSettings(
            chat_template=self.template,
            bos_token=self.bos,
            eos_token=self.eos,
            eos_token_ids=(fast.token_to_id(self.eos),),
        )
        return Tokenizer(fast, settings)


_CHATML = "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
_CHATML_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

SMOLLM2 = Shape(
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    f"You are a dog.<|im_end|>\n{{% endif %}}{_CHATML}{{% endfor %}}{_CHATML_PROMPT}",
    eos="<|im_end|>",
)
WITHOUT_GENERATION_PROMPT = Shape(f"{{% for message in messages %}}{_CHATML}{{% endfor %}}", eos="<|im_end|>")
LLAMA2 = Shape(
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = false %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}"
    "{% endif %}{% if loop.first and system %}{% set text = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m.content %}"
    "{% else %}{% set text = m.content %}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + text | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + text | trim + ' ' + eos_token }}{% endif %}{% endfor %}",
    eos="</s>",
    bos="<s>",
    metaspace=True,
)
LLAMA3 = Shape(
    "{% for m in messages %}{% set text = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim"
    " + '<|eot_id|>' %}{% if loop.first %}{% set text = bos_token + text %}{% endif %}{{ text }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    eos="<|eot_id|>",
    bos="<|begin_of_text|>",
)
ZEPHYR = Shape(
    "{% for m in messages %}\n{{ '<|' + m.role + '|>\n' + m.content + eos_token }}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
    eos="</s>",
    bos="<s>",
    metaspace=True,
)
GEMMA = Shape(
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role.replace('assistant', 'model') + '\n' + m.content | trim"
    " + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}",
    eos="<|im_end|>",
    bos="<s>",
    system=False,
)
MISTRAL_V3 = Shape(
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}"
    "{% if loop.last and system is defined %}{{ '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
    eos="</s>",
    bos="<s>",
    metaspace=True,
)

APPENDING = {"SmolLM2": SMOLLM2, "LLaMA-2": LLAMA2, "LLaMA-3": LLAMA3, "Zephyr": ZEPHYR, "Gemma": GEMMA}
"""Templates that only append when a conversation goes on."""


@cache
def fast_tokenizer(metaspace: bool) -> FastTokenizer:
    """A BPE tokenizer trained on one sentence, with the special tokens of every template."""
    fast = FastTokenizer(models.BPE(unk_token="<s>" if metaspace else None))
    if metaspace:
        fast.pre_tokenizer, fast.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        alphabet = [chr(code) for code in range(33, 127)] + ["\n"]
    else:
        fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator([TEXT], trainer)
    return fast
