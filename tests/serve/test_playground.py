"""The playground in a real browser: writing, probabilities, forks, two branches side by side, stopping, a phone's width."""

import itertools
import json
import re
import shutil
from contextlib import contextmanager

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"there is no browser here: none of {', '.join(BROWSERS)}")
    with sync_api.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


def is_complaint(message):
    """Chromium names every answer that is an error, which is none of the page's."""
    return message.type == "error" and not message.text.startswith("Failed to load resource")


@contextmanager
def opened(browser, server, **options):
    """A page that asks nobody but the server and has nothing to complain of."""
    page = browser.new_page(base_url=server.url, **options)
    page.set_default_timeout(20_000)
    wrong = []
    page.on("console", lambda message: wrong.append(message.text) if is_complaint(message) else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda sent: sent.url.startswith((server.url, "data:")) or wrong.append(sent.url))
    page.goto("/")
    is_ready(page)
    yield page
    assert wrong == []
    page.close()


def is_ready(page):
    page.wait_for_selector("#status[data-state=ready]")


def without_chance(page):
    """Lets nothing but its length end a text, of visible ASCII characters, the same ones in every run."""
    never = dict.fromkeys((str(token) for token in range(257) if not 33 <= token < 127), -1000)
    seeds = itertools.count()

    def send(route):
        body = route.request.post_data_json
        route.continue_(post_data=json.dumps({**body, "logit_bias": never, "seed": next(seeds)}))

    page.route(re.compile(r"/v1/(chat/)?completions$"), send)


def generate(page, text, tokens=12):
    page.fill("#max_tokens", str(tokens))
    page.fill("#input", text)
    page.click("#send")
    page.locator(".message.model .token").first.wait_for(state="attached")
    is_ready(page)


@pytest.mark.slow
def test_a_text_its_probabilities_and_its_branches(browser, server):
    with opened(browser, server) as page:
        without_chance(page)
        generate(page, "def area(")
        assert page.locator("article").count() == 2
        # each by itself, also of those that came together
        assert page.locator(".message.model .token").count() == 12
        assert re.fullmatch(r"[\d.]+", page.text_content("#rate"))
        assert page.text_content("#position").endswith("tokens")
        # a token says how likely it and others were, and one of those begins a branch
        page.locator(".message.model .token").nth(2).hover()
        choices = page.locator("#token .choice")
        assert choices.count() == 5
        shares = [
            float(text.split()[0])
            for text in page.locator("#token .choice > :last-child").all_text_contents()
        ]
        assert shares == sorted(shares, reverse=True)
        before = page.text_content(".message.model .text")
        page.locator("#token .choice:enabled").last.click()
        is_ready(page)
        assert page.locator("#tree button").count() == 4  # the beginning, our text, both branches
        assert page.text_content(".message.model .text")[:1] == before[:1]
        # another answer beside it, and both side by side
        page.click("text=Again")
        page.wait_for_selector("text=3 / 3")
        is_ready(page)
        page.click("text=Compare")
        columns = page.locator("#comparison .column")
        assert columns.count() == 2
        assert all("perplexity" in text for text in columns.all_text_contents())
        assert columns.nth(0).text_content() != columns.nth(1).text_content()
        page.select_option("select[aria-label='Branch B']", index=1)
        page.click("text=Go on with B")
        page.wait_for_selector("text=2 / 3")
        # rewinding and editing make branches, and lose none
        page.click("text=Rewind here")
        assert page.locator("article").count() == 1
        page.click("article >> text=Edit")
        page.fill("article textarea", "class Area")
        page.click("article >> text=Keep")
        assert page.text_content(".message.mine .text") == "class Area"
        assert page.locator("#tree button").count() == 6


@pytest.mark.slow
def test_a_conversation_by_keyboard_on_a_phone_in_the_dark(browser, server):
    phone = {"viewport": {"width": 390, "height": 800}, "color_scheme": "dark"}
    with opened(browser, server, **phone) as page:
        page.check("input[value=chat]", force=True)
        without_chance(page)
        page.fill("#max_tokens", "20000")
        page.focus("#input")
        page.keyboard.type("Tell a long story")
        page.keyboard.press("Enter")
        page.locator(".message.model .token").nth(3).wait_for(state="attached")
        page.keyboard.press("Escape")
        page.wait_for_selector("#status:text-is('stopped')")
        page.fill("#max_tokens", "5")
        page.focus("#input")
        page.keyboard.type("Another one")
        page.keyboard.press("Enter")
        page.locator("article").nth(3).wait_for()
        is_ready(page)
        assert page.evaluate(
            "document.documentElement.scrollWidth <= innerWidth"
        )  # nothing to scroll sideways
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(15, 19, 24)"
        unnamed = "[...document.querySelectorAll('button, input, textarea, select')].filter("
        unnamed += (
            "(e) => !e.getAttribute('aria-label') && !e.textContent.trim() && !e.labels?.length).length"
        )
        assert page.evaluate(unnamed) == 0  # a screen reader has a name for everything


@pytest.mark.slow
def test_what_goes_wrong_is_said_and_changes_nothing(browser, server):
    with opened(browser, server) as page:
        page.fill("#max_tokens", "1000000")
        page.fill("#input", "a")
        page.route(
            "**/v1/completions",
            lambda route: route.fulfill(status=429, json={"error": {"message": "no room"}}),
        )
        page.click("#send")
        page.wait_for_selector("#error:visible")
        assert page.text_content("#error") == "no room"
        assert page.locator(".message.model").count() == 0
