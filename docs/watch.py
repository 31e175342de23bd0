#!/usr/bin/env python3
"""Draws docs/watch.svg: what `accept_handoff --watch` shows on a terminal while workers are killed.

    cargo build --example accept_handoff && docs/watch.py > docs/watch.svg
"""

import html
import os
import pty
import signal

PROGRAM = os.path.join(os.path.dirname(__file__), "../target/debug/examples/accept_handoff")
ARGUMENTS = ["--watch", "--workers", "4", "--demo", "1000000", "--kill-every", "100"]
PICTURES = 30  # the last one is drawn
WIDTH, HEIGHT = 8.4, 19  # of a character


def main():
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(PROGRAM, [PROGRAM, *ARGUMENTS])
    written = b""
    while True:
        try:
            more = os.read(terminal, 65536)
        except OSError:  # the end: no process has the terminal
            break
        written += more
        if written.count(b"\x1b[J") >= PICTURES:
            os.kill(pid, signal.SIGTERM)
    os.waitpid(pid, 0)
    pictures = [part.split("\x1b[J")[0] for part in written.decode().split("\x1b[H")[1:]]
    lines = pictures[PICTURES - 1].replace("\x1b[K", "").splitlines()
    lines = ["$ accept_handoff " + " ".join(ARGUMENTS), *lines]
    columns = max(map(len, lines))
    width, height = round(columns * WIDTH) + 24, len(lines) * HEIGHT + 22
    print(f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">')
    print(f'<rect width="{width}" height="{height}" rx="6" fill="#16181d"/>')
    print('<g font-family="monospace" font-size="14" fill="#d6dae3" xml:space="preserve">')
    for row, line in enumerate(lines):
        if line:
            length = f'textLength="{len(line) * WIDTH:.1f}" lengthAdjust="spacingAndGlyphs"'
            y = 24 + row * HEIGHT
            print(f'<text x="12" y="{y}" {length}>{html.escape(line)}</text>')
    print("</g>\n</svg>")


if __name__ == "__main__":
    main()
