"""Draw the README's pictures from real reports: ``python docs/pictures.py`` writes ``docs/images/*.svg``.

Each picture is a chart of a report on a model that a package ships, drawn by the code that draws the HTML page.
"""

from __future__ import annotations

from pathlib import Path

import vl_convert

import setpoint
from setpoint.report.charts import draw
from setpoint.report.profiles import profiles

IMAGES = Path(__file__).parent / "images"
SHOWN = {
    "smollm2": "magnitude of the residual",
    "minilm": "cosine between",
    "vit-s": "variance of the residual",
    "mobilenetv2": "never fire",
}


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    for name, words in SHOWN.items():
        report = setpoint.check(name)
        charts = [profile.chart for profile in profiles(report.trace)]
        titles = "; ".join(chart.title for chart in charts)
        chart = next((chart for chart in charts if words.lower() in chart.title.lower()), None)
        assert chart is not None, f"no chart about {words!r} of {name}: {titles}"
        spec = draw(chart, name).spec
        (IMAGES / f"{name}.svg").write_text(vl_convert.vegalite_to_svg({**spec, "width": 420, "height": 200}))
        print(f"{name}: {chart.title}")


if __name__ == "__main__":
    main()
