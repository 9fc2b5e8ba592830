"""
Draws what programs print as a terminal shows it: (commands) | python assets/terminal.py FILE.svg
Needs rich. Of a line that was written over, as a progress bar is, the last state is drawn.
"""
import io
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 72      # letters of a line; on a phone there are 340 points for them

if __name__ == "__main__":
    lines = sys.stdin.read().rstrip("\n").split("\n")
    screen = Console(record=True, width=WIDTH, file=io.StringIO())
    screen.print(Text.from_ansi("\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines)))
    svg = screen.export_svg(title="mamba.py")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)     # they would be downloaded
    Path(sys.argv[1]).write_text(svg, encoding="utf-8")
