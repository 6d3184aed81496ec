"""The arena page in a real Chromium: the whole HTTP interface, over engines that say a sentence each."""

import json
import re
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
import uvicorn
from playwright.sync_api import Browser, Page, Route, expect

from spin_ray.serving.access import Key, new_key
from spin_ray.serving.arena.battles import Answer, Question
from spin_ray.serving.arena.votes import VoteStore
from tests.support.arena_app import EVIL, ITERATES, SAYS, TalkingEngines, make
from tests.support.chromium import headless, needs_chromium, picture

pytestmark = [pytest.mark.slow, needs_chromium]

PROMPT = "hey, how was your day?"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with headless() as browser:
        yield browser


@pytest.fixture
def serve(votes):
    """Starts the application and returns its URL."""
    stops = []

    def serve(**settings: object) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(make(votes, **settings), log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        stops.append((server, thread))
        while not server.started:
            time.sleep(0.01)
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield serve
    for server, thread in stops:
        server.should_exit = True
        thread.join(20)


@pytest.fixture
def open_page(browser):
    """Opens the page; afterwards the console must be clean: no script error, nothing that the CSP blocked."""
    problems: list[str] = []
    contexts = []

    def open_page(url: str, **settings: object) -> Page:
        context = browser.new_context(**({"viewport": {"width": 1180, "height": 760}} | settings))
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [problem for problem in problems if not problem.startswith("Failed to load resource:")] == []


def ballot(page: Page, verdict: str):
    return page.locator(f"[data-verdict={verdict}]")


def side(page: Page, name: str, part: str):
    return page.locator(f"#side-{name} .{part}")


def compare(page: Page, prompt: str = PROMPT) -> None:
    page.get_by_label("Prompt").fill(prompt)
    page.keyboard.press("Control+Enter")


@pytest.mark.parametrize(
    ("name", "look"),
    [
        ("arena", {}),
        ("arena-dark", {"color_scheme": "dark"}),
        ("arena-phone", {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}),
    ],
)
def test_a_blind_comparison_and_a_vote_by_keyboard(serve, open_page, votes, name, look):
    engines = TalkingEngines()
    engines.gate.clear()
    page = open_page(serve(engines=engines), **look)
    expect(page.get_by_role("heading", name="Which answer is better?")).to_be_visible()
    compare(page)
    expect(side(page, "a", "status")).to_have_text("writing…")
    for verdict in ("a", "tie", "both_bad", "b"):
        expect(ballot(page, verdict)).to_be_disabled()
    page.keyboard.press("1")
    assert votes.tallies() == []
    engines.gate.set()
    expect(ballot(page, "a")).to_be_enabled()
    assert page.locator(".writing").count() == 0, "votes were allowed before both answers had ended"
    for one in "ab":
        expect(side(page, one, "name")).to_have_text("hidden")
    assert not [iterate for iterate in SAYS if iterate in page.locator(".answers").inner_html()]
    picture(page, f"{name}-vote")
    page.keyboard.press("4")
    expect(page.get_by_role("status")).to_contain_text("Your vote: B is better.")
    (tally,) = votes.tallies()
    assert (tally.verdict, tally.count) == ("b", 1)
    for one, checkpoint in (("a", tally.a), ("b", tally.b)):
        expect(side(page, one, "name")).to_have_text(checkpoint[0])
        expect(side(page, one, "answer")).to_have_text(SAYS[checkpoint[0]])
    for verdict in ("a", "tie", "both_bad", "b"):
        expect(ballot(page, verdict)).to_be_disabled()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "wider than the window"
    picture(page, name)
    page.keyboard.press("n")
    expect(page.get_by_label("Prompt")).to_be_focused()
    expect(side(page, "b", "name")).to_have_text("hidden")


def hold_first_reply(page: Page, path: str, status: int | None = None) -> None:
    """Holds the first reply of ``path`` until ``release_reply``, and may make an error of it."""
    page.evaluate(
        """([path, status]) => {
          const real = window.fetch;
          window.fetch = async (url, ...rest) => {
            const reply = await real(url, ...rest);
            if (!String(url).endsWith(path) || window.reply) return reply;
            await new Promise((go) => (window.reply = go));
            return status ? new Response('{"error": {"message": "an old error"}}', { status }) : reply;
          };
        }""",
        [path, status],
    )


def wait_for_held_reply(page: Page) -> None:
    while not page.evaluate("Boolean(window.reply)"):  # the page's policy forbids wait_for_function
        page.wait_for_timeout(20)


def release_reply(page: Page) -> None:
    page.evaluate("window.reply()")
    page.wait_for_timeout(300)


@pytest.mark.parametrize("status", [None, 503])
def test_a_late_reply_to_a_vote_leaves_the_next_comparison_blind(serve, open_page, votes, status):
    page = open_page(serve())
    hold_first_reply(page, "/v1/votes", status)
    compare(page)
    expect(ballot(page, "a")).to_be_enabled()
    page.keyboard.press("1")
    wait_for_held_reply(page)
    page.locator("#again").click()
    compare(page, "another question")
    expect(ballot(page, "a")).to_be_enabled()
    release_reply(page)
    expect(page.get_by_role("alert")).to_be_hidden()
    for one in "ab":
        expect(side(page, one, "name")).to_have_text("hidden")
    page.keyboard.press("4")
    expect(page.get_by_role("status")).to_contain_text("Your vote: B is better.")
    assert sum(tally.count for tally in votes.tallies()) == 2


def test_a_late_list_of_iterates_changes_no_open_comparison(serve, open_page):
    """The list comes while both answer, without the iterates that were asked."""
    engines = TalkingEngines()
    page = open_page(serve(engines=engines))
    page.get_by_text("Open", exact=True).click()
    page.get_by_label("Log-probabilities").check()
    page.get_by_label("First iterate").select_option("iter-0")
    page.get_by_label("Second iterate").select_option("sft")
    compare(page, "hi")
    expect(side(page, "a", "answer")).to_have_text(SAYS["iter-0"])
    scored = []
    page.on("request", lambda sent: scored.append(sent.post_data_json) if sent.url.endswith("/compare") else None)
    page.locator("#margin").get_by_text("beta 0.5").wait_for()
    engines.names.serve_now(["sft", "iter-1"], newest="iter-1")
    hold_first_reply(page, "/v1/models")
    page.locator("#again").click()
    wait_for_held_reply(page)
    engines.names.serve_now(ITERATES, newest=ITERATES[-1])
    engines.gate.clear()
    compare(page, "hi")
    expect(side(page, "a", "answer")).not_to_be_empty()
    release_reply(page)
    expect(page.get_by_label("First iterate")).not_to_have_value("iter-0")
    expect(page.locator(".writing")).to_have_count(2)
    engines.gate.set()
    expect(page.locator("#margin")).to_contain_text("beta 0.5")
    assert [each["models"] for each in scored][-1] == ["iter-0", "sft"]


def test_a_page_that_is_opened_while_models_start_says_so_and_looks_again(serve, open_page):
    engines = TalkingEngines()
    engines.names.serve_now(["sft"], newest=None, starting=["iter-0"], settled=False)
    page = open_page(serve(engines=engines))
    expect(page.locator("#starting")).to_contain_text("Models start; 1 of the 2")
    expect(page.get_by_role("alert")).to_be_hidden()
    engines.names.serve_now(["sft", "iter-0"], newest="iter-0")
    expect(page.locator("#starting")).to_be_hidden()
    compare(page)
    expect(ballot(page, "a")).to_be_enabled()
    engines.names.serve_now(["sft"], newest="sft")
    page.reload()
    expect(page.get_by_role("alert")).to_contain_text("this server has 1. It serves more with --models.")
    expect(page.locator("#starting")).to_be_hidden()


def test_two_chosen_iterates_are_compared_openly_with_one_seed_and_no_vote(serve, open_page):
    page = open_page(serve())
    asked = []
    page.on(
        "request", lambda request: asked.append(request.post_data_json) if request.url.endswith("completions") else None
    )
    page.get_by_text("Open", exact=True).click()
    page.get_by_label("First iterate").select_option("sft")
    page.get_by_label("Second iterate").select_option("iter-1")
    compare(page)
    expect(side(page, "a", "answer")).to_have_text(SAYS["sft"])
    expect(side(page, "b", "answer")).to_have_text(SAYS["iter-1"])
    expect(page.locator("#ballot")).to_be_hidden()
    expect(page.locator(".lead").first).not_to_contain_text("hidden")
    expect(page.locator(".lead").first).to_contain_text("Their names are shown, so there is no vote.")
    assert {body["model"] for body in asked} == {"sft", "iter-1"}
    assert len({body["seed"] for body in asked}) == 1


def test_scores_and_margin_are_shown_once_names_are_known(serve, open_page):
    """log p −10 under the iterate that said it, −30 under the other; beta 0.5: 0.5 · ((−10 + 30) − (−30 + 10)) = 20."""
    page = open_page(serve())
    page.get_by_label("Log-probabilities").check()
    page.get_by_label("First iterate").select_option("iter-1")
    page.get_by_label("Second iterate").select_option("sft")
    compare(page)
    expect(ballot(page, "a")).to_be_enabled()
    expect(page.locator("#margin")).to_be_empty()
    assert not page.locator(".scores").all_inner_texts()[0]
    page.keyboard.press("1")
    expect(page.locator("#margin")).to_have_text("SPIN margin of iter-1 against sft: 20.00 (beta 0.5)")
    for one in "ab":
        name = side(page, one, "name").inner_text()
        expect(side(page, one, "scores")).to_contain_text(f"{name} −10.00")
        expect(side(page, one, "scores")).to_contain_text("−30.00")
    expect(page.locator("#margin-told")).to_contain_text("log p(y)/q(y)")
    picture(page, "arena-scores")
    page.get_by_text("Open", exact=True).click()
    expect(side(page, "a", "scores")).to_be_hidden()
    compare(page)
    expect(page.locator("#margin")).to_contain_text("20.00")


def test_a_chosen_pair_is_compared_blindly(serve, open_page, votes):
    page = open_page(serve())
    page.get_by_label("First iterate").select_option("iter-0")
    expect(page.get_by_label("Second iterate")).to_have_value("iter-1")
    page.get_by_label("Second iterate").select_option("sft")
    compare(page)
    expect(ballot(page, "tie")).to_be_enabled()
    ballot(page, "tie").click()
    expect(page.get_by_role("status")).to_contain_text("a tie")
    (tally,) = votes.tallies()
    assert {tally.a[0], tally.b[0]} == {"iter-0", "sft"}


def test_what_models_say_is_text_and_never_markup(serve, open_page):
    page = open_page(serve())
    compare(page, "evil")
    expect(ballot(page, "a")).to_be_enabled()
    for one in "ab":
        expect(side(page, one, "answer")).to_have_text(EVIL)
    assert page.locator(".answer img, .answer script").count() == 0 and page.title() == "spin_ray arena"


def test_failures_are_told_in_words_and_cost_the_vote(serve, open_page):
    page = open_page(serve())
    compare(page, "please fail")
    for one in "ab":
        expect(side(page, one, "status")).to_have_text("the engine failed; the request may be repeated")
    expect(page.get_by_role("status")).to_have_text("No vote without two whole answers.")
    expect(ballot(page, "a")).to_be_disabled()
    compare(page, PROMPT)
    expect(ballot(page, "a")).to_be_enabled()


def test_a_server_that_is_full_says_when_to_come_back(serve, open_page):
    engines = TalkingEngines()
    engines.gate.clear()
    url = serve(max_concurrent=3, engines=engines)
    first, second = open_page(url), open_page(url)
    compare(first)
    expect(side(first, "a", "answer")).not_to_be_empty()
    compare(second)
    told = re.compile(r"All places are taken; try again in a moment \(in [1-3] s\)")
    expect(second.get_by_role("alert")).to_have_text(told)
    expect(second.locator(".failed .status")).to_have_text(["not asked", "not asked"])
    expect(ballot(second, "a")).to_be_disabled()


def test_streams_can_be_stopped(serve, open_page):
    engines = TalkingEngines()
    engines.gate.clear()
    page = open_page(serve(engines=engines))
    compare(page)
    expect(side(page, "a", "answer")).not_to_be_empty()
    page.keyboard.press("Escape")
    expect(side(page, "a", "status")).to_have_text("stopped")
    expect(page.get_by_role("button", name="Compare")).to_be_enabled()
    expect(ballot(page, "a")).to_be_disabled()


def test_a_server_that_went_away_is_told_so(serve, open_page):
    page = open_page(serve())
    page.context.set_offline(True)
    compare(page)
    expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached.")


def test_a_server_with_keys_is_given_one_for_this_tab_only(serve, open_page):
    key, line = new_key("alice")
    page = open_page(serve(keys=[Key("alice", line.split()[1], None)]))
    field = page.get_by_label("This server asks for an API key")
    field.fill("wrong")
    page.keyboard.press("Enter")
    page.get_by_label("The server does not know this API key").fill(key)
    page.keyboard.press("Enter")
    expect(page.locator("#key-form")).to_be_hidden()
    compare(page)
    expect(ballot(page, "a")).to_be_enabled()
    assert page.evaluate("[Object.values(sessionStorage), localStorage.length, document.cookie]") == [
        [key],
        0,
        "",
    ]


def test_the_leaderboard_shows_ratings_and_the_pairs_can_be_downloaded(serve, open_page, votes):
    url = serve()
    page = open_page(f"{url}/#leaderboard")
    expect(page.locator("#votes-counted")).to_contain_text("No votes yet")
    fill(votes)
    page.reload()
    expect(page.locator("#votes-counted")).to_have_text("14 votes so far.")
    rows = page.locator("#ratings tbody tr")
    expect(rows).to_have_count(3)
    expect(rows.first).to_contain_text(re.compile(r"^iter-1\d{4}\d+ to \d{4}8"))
    expect(page.locator("#pairs tbody tr")).to_have_count(3)
    told = re.compile(r"^iter-1 above \S+ in 9\d\.\d % of draws: (told apart\.|not told apart \(from 97\.5 % on\)\.)$")
    expect(page.locator("#apart li")).to_have_count(2)
    expect(page.locator("#apart li").first).to_have_text(told)
    picture(page, "arena-leaderboard")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download votes as pairs").click()
    pairs = [json.loads(line) for line in download.value.path().read_text().splitlines()]
    assert len(pairs) == 11 and download.value.suggested_filename == "votes.jsonl"


def test_an_older_reply_does_not_replace_a_newer_leaderboard(serve, open_page, votes):
    page = open_page(serve())
    hold_first_reply(page, "/v1/leaderboard")
    page.get_by_role("link", name="Leaderboard").click()
    wait_for_held_reply(page)
    fill(votes)
    page.get_by_role("link", name="Compare").click()
    page.get_by_role("link", name="Leaderboard").click()
    expect(page.locator("#votes-counted")).to_have_text("14 votes so far.")
    release_reply(page)
    expect(page.locator("#votes-counted")).to_have_text("14 votes so far.")


def test_the_leaderboard_gives_the_bound_that_the_server_uses(serve, open_page, votes):
    fill(votes)

    def stricter(route: Route) -> None:
        route.fulfill(json=route.fetch().json() | {"told_apart_from": 0.99})

    page = open_page(serve())
    page.route("**/v1/leaderboard", stricter)
    page.get_by_role("link", name="Leaderboard").click()
    expect(page.locator("#method")).to_contain_text(
        "in 99.0 % of its draws; of two equal ones, that happens in 2 cases"
    )


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_is_wider_than_the_window_and_one_line_of_controls_is_enough_for_a_desk(serve, open_page, votes, width):
    fill(votes)
    url = serve(max_tokens=99)
    phone = {"has_touch": True, "is_mobile": True} if width < 700 else {}
    page = open_page(url, viewport={"width": width, "height": 800}, **phone)
    expect(page.get_by_label("Max tokens")).to_have_attribute("max", "99")
    expect(page.get_by_label("Max tokens")).to_have_value("99")
    wider = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    page.get_by_label("Prompt").fill("  hey\n")
    page.get_by_role("button", name="Compare").click()
    expect(ballot(page, "a")).to_be_enabled()
    expect(page.get_by_label("Prompt")).to_have_value("hey")
    assert page.evaluate(wider) == 0 and page.evaluate("innerWidth") == width
    if width == 1280:
        middles = "[...document.querySelectorAll('.controls > *')].filter((it) => it.offsetParent)"
        tops = page.evaluate(f"{middles}.map((it) => it.offsetTop + it.offsetHeight / 2)")
        assert max(tops) - min(tops) < 6
    page.get_by_role("link", name="Leaderboard").click()
    expect(page.locator("#ratings tbody tr")).to_have_count(3)
    card = page.locator("#ratings-card")
    assert page.evaluate(wider) == 0
    card.evaluate("card => { card.scrollLeft = 10_000; }")
    box, last = card.bounding_box(), card.locator("tbody td").last.bounding_box()
    assert last["x"] + last["width"] <= box["x"] + box["width"]


@pytest.mark.e2e
def test_a_blind_comparison_and_a_vote_on_the_real_server(served, open_page):
    """Real vLLM, a tiny random model: both answers end, and the vote is of the checkpoints that answered."""
    page = open_page(served.url)
    page.get_by_label("Max tokens").fill("16")
    compare(page)
    expect(ballot(page, "a")).to_be_enabled(timeout=60_000)
    said = page.locator(".side").all_inner_texts()
    assert not [name for name in ("sft", "iter-") for text in said if name in text]
    ballot(page, "a").click()
    expect(page.get_by_role("status")).to_contain_text("Your vote: A is better.", timeout=60_000)
    winner, loser = (side(page, one, "name").inner_text() for one in "ab")
    assert {winner, loser} == {"sft", "iter-0"}
    board = httpx.get(f"{served.url}/v1/leaderboard", timeout=60).json()
    assert board["votes"] == 1 and board["ratings"][0]["model"] == winner
    assert board["ratings"][0]["digest"] == served.card(winner)["digest"]
    (pair,) = map(json.loads, httpx.get(f"{served.url}/v1/votes/export", timeout=60).text.splitlines())
    assert pair["rejected_model"] == loser and pair["chosen"][:-1] == [{"role": "user", "content": PROMPT}]
    assert served.run.storage.exists("votes.sqlite")


def fill(votes: VoteStore) -> None:
    """Casts 14 votes on three iterates; iter-1 wins 8 of its 10."""
    verdicts = {("sft", "iter-0"): ["a", "b", "tie", "both_bad"], ("sft", "iter-1"): ["b"] * 4 + ["a"]}
    for (a, b), given in (verdicts | {("iter-1", "iter-0"): ["a"] * 4 + ["tie"]}).items():
        for verdict in given:
            battle = votes.start(a, b, Question([], {"seed": 1}))
            votes.record(battle.id, "a", Answer("hi", "stop", f"{a}-digest"))
            votes.record(battle.id, "b", Answer("hi", "stop", f"{b}-digest"))
            votes.vote(battle.id, verdict)
