from __future__ import annotations

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models

from prism_trt.target.token_bytes import TokenBytes
from tests.tiny import TEXT, tiny_tokenizer


def test_byte_level_tokens() -> None:
    tokenizer = tiny_tokenizer()
    text = TEXT + "\n\t\x00 ½ é\u00ad"
    ids = tokenizer.encode(text)
    pieces = [tokenizer.token_bytes(token) for token in ids]
    assert b"".join(pieces) == text.encode()
    assert any(not _whole(piece) for piece in pieces)
    assert tokenizer.token_bytes(tokenizer.eos_token_ids[0]) == b"<|im_end|>"
    assert tokenizer.token_bytes(10**6) == b""


def test_tokens_with_byte_fallback() -> None:
    vocabulary = {"\u2581the": 0, "<0xC3>": 1, "<0x9F>": 2, "dog": 3}
    fast = FastTokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    fast.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast.add_special_tokens(["</s>"])
    token_bytes = TokenBytes(fast)
    pieces = [token_bytes(token) for token in range(5)]
    assert pieces == [b" the", b"\xc3", b"\x9f", b"dog", b"</s>"]
    assert b"".join(pieces[:4]).decode() == fast.decode([3, 0, 1, 2, 3])[3:]


def _whole(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
