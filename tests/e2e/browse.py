"""Uses the dashboard in headless Chromium as a person would; prints what it saw as JSON.

    python -m tests.e2e.browse URL DIRECTORY

It runs on the cluster's own host, without any other network: what the page needs must come from the router.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

WAIT_S = 40.0
_ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_PAINTED = """
return [...document.querySelectorAll('.chart')].map((chart) => {
  const canvas = chart.querySelector('canvas');
  const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  const colours = new Set();
  for (let i = 0; i < data.length; i += 4)
    if (data[i + 3]) colours.add((data[i] << 16) | (data[i + 1] << 8) | data[i + 2]);
  return [chart.id, colours.size];
});
"""
_TILES = """
return Object.fromEntries(
  [...document.querySelectorAll('.tile')].map((tile) => [tile.dataset.metric, tile.querySelector('b').textContent]));
"""
_POINTS = "return performance.getEntriesByType('resource').filter((e) => e.name.endsWith('/admin/metrics')).length"
_METRICS = "return fetch('/metrics').then((answer) => answer.text())"


class Visit:
    """One browser window."""

    def __init__(self, url: str, directory: Path) -> None:
        options = webdriver.ChromeOptions()
        for argument in (*_ARGUMENTS, f"--user-data-dir={directory / 'profile'}"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.browser = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
        self.browser.set_window_size(1280, 1500)
        self._url, self._directory = url, directory

    def until(self, condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + WAIT_S
        while not (found := condition()):
            if time.monotonic() > deadline:
                self.shot("late")
                raise TimeoutError(self.browser.find_element(By.TAG_NAME, "body").text)
            time.sleep(0.1)
        return found

    def text(self, selector: str) -> str:
        """What is written there. Read at once: the page renews its elements every other second."""
        text = f"return [...document.querySelectorAll('{selector}')].map((found) => found.innerText).join(' ')"
        return " ".join(str(self.js(text)).split())

    def click(self, selector: str, index: int = 0) -> None:
        """As soon as there is such an element, and it is enabled."""
        script = f"""
        const found = document.querySelectorAll('{selector}')[{index}];
        if (!found || found.disabled) return false;
        found.click();
        return true;
        """
        self.until(lambda: self.js(script))

    def js(self, script: str) -> Any:
        return self.browser.execute_script(script)

    def shot(self, name: str) -> None:
        self.browser.save_screenshot(str(self._directory / f"{name}.png"))

    def look_around(self) -> dict[str, Any]:
        saw: dict[str, Any] = {}
        self.browser.get(f"{self._url}/dashboard")
        self.until(lambda: self.text("#state") == "serving")
        self.browser.find_element(By.CSS_SELECTOR, '#window option[value="0"]').click()
        self.until(lambda: "–" not in self.js(_TILES).get("TTFT p50", "–"))
        self.until(lambda: self.js(_POINTS) > 3)  # lines have a length
        saw["painted"] = dict(self.js(_PAINTED))
        saw["before"], saw["tiles"], saw["after"] = self.js(_METRICS), self.js(_TILES), self.js(_METRICS)
        saw["workers"] = self.text("#workers")
        self.click("#requests a")
        self.until(lambda: "hand-off" in self.text("#waterfall"))
        saw["waterfall"] = self.text("#waterfall")
        self.shot("light")
        self.click("#theme")
        saw["dark"] = self.js("return getComputedStyle(document.body).backgroundColor")
        self.shot("dark")
        return saw

    def scale(self) -> list[str]:
        """Grow decode by one and take it back."""
        sizes = []
        for sign, wanted in ((1, "2 / 2"), (0, "1 / 1")):
            self.click('.pool[data-pool="decode"] button', sign)
            self.until(lambda w=wanted: self.text('.pool[data-pool="decode"] .size') == w)
            sizes.append(self.text('.pool[data-pool="decode"] .size'))
        return sizes

    def on_a_phone(self) -> dict[str, int]:
        self.browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": 375, "height": 812, "deviceScaleFactor": 2, "mobile": True},
        )
        self.until(lambda: self.js("return innerWidth") == 375)
        self.shot("phone")
        return {
            "width": self.js("return innerWidth"),
            "content": self.js("return document.documentElement.scrollWidth"),
        }


def main(url: str, directory: str) -> None:
    visit = Visit(url, Path(directory))
    try:
        saw = visit.look_around()
        saw["sizes"] = visit.scale()
        saw["phone"] = visit.on_a_phone()
        saw["resources"] = visit.js("return performance.getEntriesByType('resource').map((entry) => entry.name)")
        saw["console"] = [entry["message"] for entry in visit.browser.get_log("browser") if entry["level"] == "SEVERE"]
    finally:
        visit.browser.quit()
    print(json.dumps(saw))


if __name__ == "__main__":
    main(*sys.argv[1:])
