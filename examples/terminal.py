#!/usr/bin/env python3
"""Draws terminal.svg, the picture of the README, from a real run.

    python terminal.py                  writes terminal.svg beside this file
    python terminal.py --out other.svg

Three commands run in a pseudo-terminal on throw-away hosts inside the process; what they say, with
its colours, becomes an SVG: dark, with a frame, so that it can be read on any page.
"""

import argparse
import contextlib
import fcntl
import html
import os
import pty
import re
import shlex
import struct
import sys
import tempfile
import termios
from pathlib import Path

HERE = Path(__file__).resolve().parent
COLUMNS, ROWS = 76, 40
CELL, LINE, MARGIN = 8.4, 20, 16  # pixels: a character, a line, what is around them
FONT = 'font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="14"'
PLAIN, PAPER, FRAME = "#d4d4d4", "#1e1e1e", "#808080"
COLOURS = {
    "30": "#808080",
    "31": "#ff7b72",
    "32": "#7ee787",
    "33": "#e3b341",
    "34": "#79c0ff",
    "35": "#d2a8ff",
    "36": "#76e3ea",
    "37": "#ffffff",
}
COMMANDS = (
    ("apssh", "--demo 4 'echo hello; test ${HOME##*/} != demo3'"),
    ("apssh", "--demo 9 -b 'uname -s; test ${HOME##*/} != demo5'"),
    ("appush", "--demo 20 -r site @:"),
)
MAINS = {"apssh": "main", "appush": "main_push"}


def output(program: str, words: list[str]) -> str:
    """What a program says on a terminal of its own."""
    pid, fd = pty.fork()
    if pid == 0:
        os.environ |= {"SHELL": "/bin/bash", "TERM": "xterm-256color"}
        os.environ.pop("NO_COLOR", None)
        code = (
            f"import sys; sys.path.insert(0, {str(HERE.parent)!r}); "
            f"import apssh; sys.exit(apssh.{MAINS[program]}())"
        )
        os.execv(sys.executable, [sys.executable, "-c", code, *words])
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    seen = b""
    with contextlib.suppress(OSError):  # so Linux tells the end
        while data := os.read(fd, 65536):
            seen += data
    os.close(fd)
    os.waitpid(pid, 0)
    lines = seen.decode().replace("\r\n", "\n").split("\n")
    # a line of progress is written over: what follows the last return to the left stays
    return "\n".join(re.sub(r"\x1b\[\d*K", "", line.rpartition("\r")[2]) for line in lines)


def drawn(text: str) -> list[str]:
    """Its lines as SVG; a colour lasts until the next one, over the ends of lines too."""
    colour, weight, lines = PLAIN, "normal", [""]
    for piece in re.split(r"(\x1b\[[\d;]*m|\n)", text):
        code = piece[2:-1]
        if piece == "\n":
            lines.append("")
        elif piece and not piece.startswith("\x1b"):
            shown = html.escape(piece, quote=False)
            lines[-1] += f'<tspan fill="{colour}" font-weight="{weight}">{shown}</tspan>'
        elif code == "1":
            weight = "bold"
        elif code in COLOURS:
            colour = COLOURS[code]
        else:
            colour, weight = PLAIN, "normal"
    return lines


def picture(text: str) -> str:
    """The terminal as SVG."""
    lines = drawn(text)
    width, height = round(COLUMNS * CELL + 2 * MARGIN), len(lines) * LINE + 2 * MARGIN
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {FONT}>'
    paper = (
        f'<rect x="1" y="1" width="{width - 2}" height="{height - 2}" rx="8" '
        f'fill="{PAPER}" stroke="{FRAME}"/>'
    )
    texts = [
        f'<text xml:space="preserve" x="{MARGIN}" y="{MARGIN + LINE * number + 15}">{line}</text>'
        for number, line in enumerate(lines)
        if line
    ]
    return "\n".join([head, paper, *texts, "</svg>\n"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE / "terminal.svg")
    out = parser.parse_args().out.resolve()
    text = ""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("site").mkdir()
        Path("site", "index.html").write_text("hello\n")
        for program, words in COMMANDS:
            text += f"\x1b[32m$\x1b[0m \x1b[1m{program} {words}\x1b[0m\n"
            text += output(program, shlex.split(words))
        os.chdir(HERE)
    out.write_text(picture(text.rstrip("\n")), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
