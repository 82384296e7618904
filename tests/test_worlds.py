"Heavier properties of the story world"
import hashlib, random
from collections import Counter

import pytest

from lcm_nb.worlds.lexicon import FORMS, LANGUAGES, random_events, tell, parse, tokens, join, words
from lcm_nb.worlds.stories import END, MAX_LENGTH, StoryWorld, State, apply, menu, sample

world = StoryWorld()


@pytest.fixture(scope="module")
def stories(): return world.stories(400, seed=11)


@pytest.mark.parametrize("lang", LANGUAGES)
def test_events_and_sentences_determine_each_other(lang):
    events = list(set(random_events(4000, seed=2)))
    sentences = [tell(e, lang) for e in events]
    assert [parse(s, lang) for s in sentences] == events
    assert len(set(sentences)) == len(events)
    assert all(join(tokens(s), lang) == s for s in sentences)
    assert {t.lower() for s in sentences for t in tokens(s)} <= words(lang)


@pytest.mark.parametrize("lang", LANGUAGES)
def test_sentences_of_another_language_or_damaged_ones_are_not_read(lang):
    sentences = [tell(e, lang) for e in random_events(500, seed=3)]
    assert not any(parse(s, other) for other in LANGUAGES if other != lang for s in sentences)
    assert not any(parse(bad, lang) for s in sentences for bad in (s[:-1], s.lower(), s + " ", s.swapcase(), s + s))


def test_every_story_replays_and_may_end(stories):
    for story in stories:
        state = world.replay(story.events)
        assert state is not None and world.prob(END, state) > 0
        assert 5 <= len(story.events) <= MAX_LENGTH


def test_no_state_is_a_dead_end():
    for i in range(1000):
        rng, state = random.Random(i), State()
        while (kinds := list(menu(state))) and kinds != [END.kind] and not state.over:
            state = apply(state, sample(state, rng))
        assert kinds


def test_next_is_a_distribution_over_exactly_the_possible_events(stories):
    for story in stories[:40]:
        for i in range(1, len(story.events) + 1):
            state = world.replay(story.events[:i])
            events = world.next(state)
            assert abs(sum(p for _, p in events) - 1) < 1e-9 and min(p for _, p in events) > 0
            assert len({e for e, _ in events}) == len(events) <= 600
            assert all(abs(world.prob(e, state) - p) < 1e-12 for e, p in events[::7])
            assert all(parse(tell(e), "eng_Latn") == e for e, _ in events[::7] if e != END)
            assert all(world.step(state, e) is not None for e, _ in events[::7])


def test_splits_share_no_story():
    told = {s: {x.events for x in world.stories(1000, seed=0, split=s)} for s in ("train", "validation", "test")}
    assert not told["train"] & told["validation"] and not told["train"] & told["test"] and not told["validation"] & told["test"]


def test_every_form_occurs_in_stories():
    assert {e.kind for x in world.stories(3000, seed=0) for e in x.events} == set(FORMS) - {"end"}


def test_shuffled_stories_are_mostly_impossible(stories):
    rng, replayed = random.Random(0), 0
    for story in stories[:300]:
        events = list(story.events)
        rng.shuffle(events)
        replayed += world.replay(events) is not None
    assert replayed < 10


def test_kinds_are_as_frequent_as_stated(stories):
    seen, stated = Counter(), Counter()
    for story in stories:
        for i, e in enumerate(story.events[1:], 1):
            seen[e.kind] += 1
            stated.update(world.kinds(world.replay(story.events[:i])))
    for kind, n in seen.items():
        assert abs(n - stated[kind]) < 5 * max(stated[kind], 9) ** .5 + 1, (kind, n, stated[kind])


def test_sentences_survive_segmentation(stories):
    sentencex = pytest.importorskip("sentencex")
    for lang in LANGUAGES:
        for story in stories[:200]:
            told = story.tell(lang)
            assert [s.strip() for s in sentencex.segment({"eng_Latn": "en", "fra_Latn": "fr", "deu_Latn": "de"}[lang], " ".join(told)) if s.strip()] == told


def test_this_version_is_frozen():
    text = "\n".join(s for x in world.stories(60, seed=0) for lang in LANGUAGES for s in x.tell(lang))
    assert (world.version, hashlib.sha256(text.encode()).hexdigest()[:16]) == ("2", "924f206093ddf552")
