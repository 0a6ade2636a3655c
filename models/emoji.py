"""The data set: glyphs of Noto Color Emoji with their Unicode names, groups and subgroups.

Needs the Debian packages ``fonts-noto-color-emoji`` (SIL Open Font License 1.1) and ``unicode-data``, or the same two
files from elsewhere named by ``EMOJI_FONT`` and ``EMOJI_TEST``.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

FONT = Path(os.environ.get("EMOJI_FONT", "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"))
TEST = Path(os.environ.get("EMOJI_TEST", "/usr/share/unicode/emoji/emoji-test.txt"))
STRIKE = 109  # the only bitmap size in the font; its glyphs are 136 x 128 pixels
SKIN_TONES = {f"{code:X}" for code in range(0x1F3FB, 0x1F400)}
DIRECTED_GROUPS = {"Symbols", "Flags"}  # a mirrored letter, arrow or flag is another sign
DIRECTED_SUBGROUPS = {"time", "office", "writing", "book-paper", "transport-sign"}


@dataclass(frozen=True)
class Emoji:
    """One emoji of ``emoji-test.txt``."""

    text: str
    name: str
    group: str
    subgroup: str

    @property
    def held_out(self) -> bool:
        """One in ten, decided by the name alone, so that the split never moves."""
        return int(hashlib.sha256(self.name.encode()).hexdigest(), 16) % 10 == 0

    @property
    def may_flip(self) -> bool:
        return self.group not in DIRECTED_GROUPS and self.subgroup not in DIRECTED_SUBGROUPS


def read_names(path: Path = TEST) -> list[Emoji]:
    """Fully-qualified emoji without skin-tone variants, in the order of the file."""
    found, group, subgroup = [], "", ""
    for line in path.read_text(encoding="utf8").splitlines():
        if line.startswith("# group:"):
            group = line.split(":", 1)[1].strip()
        elif line.startswith("# subgroup:"):
            subgroup = line.split(":", 1)[1].strip()
        elif match := re.match(r"([0-9A-F ]+); fully-qualified +# \S+ E[\d.]+ (.+)", line):
            codes = match[1].split()
            if not SKIN_TONES & set(codes):
                text = "".join(chr(int(code, 16)) for code in codes)
                found.append(Emoji(text, match[2].strip(), group, subgroup))
    return found


def render(text: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """The glyph on white, [160, 160] RGB, centred; sequences are joined by raqm."""
    canvas = Image.new("RGB", (160, 160), "white")
    ImageDraw.Draw(canvas).text((80, 80), text, font=font, embedded_color=True, anchor="mm")
    return canvas


def load(size: int = 64) -> tuple[np.ndarray, list[Emoji], list[str]]:
    """Images [count, size, size, 3] uint8, their emoji, and the sorted subgroups (the classes)."""
    if not features.check("raqm"):
        raise SystemExit("Pillow lacks raqm (Debian: libraqm0), without which joined emoji fall apart")
    font = ImageFont.truetype(str(FONT), STRIKE, layout_engine=ImageFont.Layout.RAQM)
    images, kept, seen = [], [], set()
    for emoji in read_names():
        picture = render(emoji.text, font)
        key = picture.tobytes()
        box = picture.convert("L").point(lambda value: 255 * (value < 250)).getbbox()
        if box is None or box[2] - box[0] > 140 or key in seen:  # blank, several glyphs side by side, or drawn already
            continue
        seen.add(key)
        images.append(np.asarray(picture.crop((10, 10, 150, 150)).resize((size, size), Image.Resampling.LANCZOS)))
        kept.append(emoji)
    return np.stack(images), kept, sorted({emoji.subgroup for emoji in kept})


def augment(images: np.ndarray, may_flip: np.ndarray, rng: np.random.Generator, *, shift: int = 2) -> np.ndarray:
    """Flip where that keeps the meaning, and move by up to ``shift`` pixels on white; [count, h, w, 3] uint8."""
    height, width = images.shape[1:3]
    padded = np.pad(images, ((0, 0), (shift, shift), (shift, shift), (0, 0)), constant_values=255)
    out = np.empty_like(images)
    for index, (image, flips) in enumerate(zip(padded, may_flip & (rng.random(len(images)) < 0.5), strict=True)):
        y, x = rng.integers(0, 2 * shift + 1, size=2)
        crop = image[y : y + height, x : x + width]
        out[index] = crop[:, ::-1] if flips else crop
    return out
