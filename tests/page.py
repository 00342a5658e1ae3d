"""MLflow's comparison page as a person sees it, in headless Chromium.

usage: python tests/page.py ADDRESS PICTURE.png
"""
from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By

SIZE = (1900, 1750)
NEEDED = ("chromium", "chromedriver")


def absent() -> str | None:
    """Why no page can be opened here, or None."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    return f"{', '.join(missing)} not found; install chromium and chromium-driver" if missing else None


def opened(address: str, plots: int, picture: Path, seconds: float = 60) -> tuple[list[str], str]:
    """Opens the address, waits until `plots` charts are drawn, takes a picture, and returns the charts' titles in order and
    all of the page's text. Fails where they are not drawn in time."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
                 f"--window-size={SIZE[0]},{SIZE[1]}"):
        options.add_argument(word)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        browser.get(address)
        end = time.monotonic() + seconds
        while len(browser.find_elements(By.CSS_SELECTOR, ".js-plotly-plot .main-svg")) < plots:
            assert time.monotonic() < end, f"no {plots} charts within {seconds} s: {browser.page_source[:2000]}"
            time.sleep(0.25)
        for button in browser.find_elements(By.CSS_SELECTOR, "[aria-label='Close']"):  # the assistant beside the page
            button.click()
        time.sleep(2)  # charts fade in and fit themselves to the page
        browser.save_screenshot(str(picture))
        titles = [title.text for title in browser.find_elements(By.TAG_NAME, "h4")]
        return titles, browser.find_element(By.TAG_NAME, "body").text
    finally:
        browser.quit()


if __name__ == "__main__":
    print(*opened(sys.argv[1], 6, Path(sys.argv[2]))[0], sep="\n")
