"""Text encoders behind one protocol."""

from fastvdiff.text.bytes import ByteTextEncoder, ByteTextEncoderConfig
from fastvdiff.text.encoder import TextEncoder

__all__ = ["ByteTextEncoder", "ByteTextEncoderConfig", "TextEncoder"]
