"""A token -> the bytes that it writes. A character may be several tokens, so a token alone may be no text at all."""

import re
from typing import Any

BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""How sentencepiece spells a byte that no token of its vocabulary covers."""


class Pieces:
    """The tokens of a Hugging Face tokenizer as bytes."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = {id: token.content for id, token in tokenizer.added_tokens_decoder.items()}
        self._bytes = _byte_of_letter() if type(tokenizer.backend_tokenizer.decoder).__name__ == "ByteLevel" else None

    def bytes_of(self, id: int) -> bytes:
        """What a token writes, in UTF-8; of an added token, its name."""
        if id in self._special:
            return self._special[id].encode()
        token = str(self._tokenizer.convert_ids_to_tokens(id))
        if self._bytes is None:
            return spelled(token)
        return b"".join(self._bytes.get(letter, letter.encode()) for letter in token)


def spelled(piece: str) -> bytes:
    """What a piece of sentencepiece's writes."""
    byte = BYTE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()


def _byte_of_letter() -> dict[str, bytes]:
    """Byte-level tokenizers spell each byte as a letter that can be seen: the visible ones of Latin-1 as they are, the others
    in order from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    letters = {chr(byte): bytes([byte]) for byte in visible}
    return letters | {chr(0x100 + n): bytes([byte]) for n, byte in enumerate(others)}
