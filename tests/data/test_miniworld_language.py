"""What is said about scenes: captions, questions, conventions, joint questions, instructions, corpus."""

from collections import Counter

import pytest

from graftlm.core.seeds import rng
from graftlm.data.miniworld.captions import TEMPLATES, caption, captions
from graftlm.data.miniworld.combinations import COMBINATIONS, draw_choice, draw_combined
from graftlm.data.miniworld.conventions import CONVENTIONS, in_force, otherwise, reword
from graftlm.data.miniworld.instructions import FORMATS, draw_instruction
from graftlm.data.miniworld.joint import KINDS, colors_of, draw_joint
from graftlm.data.miniworld.notes import SEPARATOR, notes, sentence
from graftlm.data.miniworld.questions import Question, questions
from graftlm.data.miniworld.scenes import MODALITIES, draw
from graftlm.data.miniworld.text import OTHER_WORDS, text_sample, vocabulary
from graftlm.data.miniworld.words import COLORS, INSTRUMENTS, LETTERS, NUMBERS

EVERY = [(modality, visit) for modality in MODALITIES for visit in (1, 2)]


@pytest.mark.parametrize(("modality", "visit"), EVERY)
def test_captions_of_all_templates_differ_and_point_captions_stay_below_100_characters(modality, visit):
    stream = rng(0, "captions", modality, visit)
    for _ in range(100):
        scene = draw(modality, stream, visit=visit)
        said = captions(scene, stream, TEMPLATES)
        assert len(set(said)) == TEMPLATES
        if modality == "point":
            assert max(map(len, said)) <= 100


def test_no_two_modalities_share_a_caption_opening():
    stream = rng(0, "style")
    openings = Counter()
    for modality, visit in EVERY:
        for template in range(TEMPLATES):
            openings[" ".join(caption(draw(modality, stream, visit=visit), stream, template).split()[:3])] += 1
    assert openings.most_common(1)[0][1] <= 2


@pytest.mark.parametrize(("modality", "visit"), EVERY)
def test_questions_have_one_answer_each(modality, visit):
    stream = rng(0, "questions", modality, visit)
    for _ in range(100):
        scene = draw(modality, stream, visit=visit)
        answers: dict[str, str] = {}
        for _ in range(4):
            for question in questions(scene, stream):
                assert question.text.endswith(" ?")
                assert question.answer
                assert answers.setdefault(question.text, question.answer) == question.answer


def test_yes_and_no_are_balanced():
    stream = rng(0, "balance")
    for modality, visit in EVERY:
        said = [
            question.answer
            for _ in range(400)
            for question in questions(draw(modality, stream, visit=visit), stream)
            if question.kind == "yes_no"
        ]
        assert said.count("yes") / len(said) == pytest.approx(0.5, abs=0.1)


def test_notes_are_separated_groups_in_any_order():
    stream = rng(0, "notes")
    scene = draw("audio", stream)
    orders = {SEPARATOR.join(notes(scene, stream)) for _ in range(50)}
    assert len(orders) > 10
    assert len({frozenset(order.split(SEPARATOR)) for order in orders}) == 1


def test_conflict_puts_conventions_in_force_one_by_one():
    assert in_force(0) == ()
    assert in_force(1) == CONVENTIONS
    assert [len(in_force(count / len(CONVENTIONS))) for count in range(7)] == list(range(7))


def test_conventions_make_modalities_contradict_one_another():
    for convention in CONVENTIONS:
        assert convention.modalities
        assert convention.modalities < set(MODALITIES)
    question = Question("is there a red circle ?", "yes", "yes_no")
    assert [reword(question, modality, CONVENTIONS) for modality in MODALITIES] == ["yes", "true", "yes", "true"]
    pair = Question("what is on top ?", "red cube", "pair")
    assert reword(pair, "point", CONVENTIONS) == "cube red"
    assert reword(pair, "image", CONVENTIONS) == "red cube"
    assert reword(pair, "point", ()) == "red cube"
    assert otherwise(Question("how many notes are there ?", "three", "number")) == "3"
    assert otherwise(Question("what is the bell doing ?", "ringing")) == "ringing"


@pytest.mark.parametrize("kind", KINDS)
def test_joint_questions_have_exactly_one_right_option(kind):
    stream = rng(0, "joint", kind)
    for number in range(60):
        letter = LETTERS[number % 4]
        question = draw_joint(stream, "test", letter, kind)
        image, video, audio, point = (question.scenes[modality] for modality in MODALITIES)
        shown = [
            {COLORS[thing.color] for thing in image.things},
            {COLORS[video.color]} | ({COLORS[video.turned]} if video.turned >= 0 else set()),
            {COLORS[part.color] for part in point.parts},
        ]
        shared = set.intersection(*shown)
        grounds = {"dark": 0, "gray": 1, "light": 2}

        def is_right(option, scenes=(image, video, audio), shared=shared, grounds=grounds):
            image, video, audio = scenes
            match kind:
                case "color":
                    return option in shared
                case "combination":
                    color, instrument = option.split(" and ")
                    return color in shared and instrument == INSTRUMENTS[audio.instrument]
                case "number":
                    return NUMBERS.index(option) == image.count == audio.count
                case _:
                    if option == "different":
                        return image.background != video.background
                    return image.background == video.background == grounds[option]

        assert len(set(question.options)) == 4
        assert [is_right(option) for option in question.options] == [letter == other for other in LETTERS]
        if kind == "color":
            assert any(option in set.union(*shown) - shared for option in question.options)


@pytest.mark.parametrize("form", FORMATS)
def test_instructions_say_the_form_and_answers_obey_it(form):
    stream = rng(0, "instructions", form)
    ends = {
        "word": "answer with one word .",
        "letter": "answer with a letter .",
        "list": "answer with a list .",
        "yes_no": "answer yes or no .",
        "sentence": "in one sentence .",
    }
    for _ in range(60):
        drawn = draw_instruction(stream, "train", form)
        assert drawn.text.endswith(ends[form])
        match form:
            case "word":
                assert " " not in drawn.answer
            case "letter":
                words = drawn.text.split()
                assert drawn.answer in LETTERS
                assert len({words[words.index(letter) + 1] for letter in LETTERS}) == 4
            case "list":
                assert len(drawn.answer.split(" , ")) >= 2
            case "yes_no":
                assert drawn.answer in ("yes", "no")
            case _:
                assert drawn.answer == sentence(drawn.scene)


def test_the_corpus_mixes_forms_as_documented_and_knows_every_word():
    stream = rng(0, "corpus")
    samples = [text_sample(stream) for _ in range(3000)]
    known = set(vocabulary())
    assert {word for sample in samples for text in sample for word in text.split()} <= known
    texts = [text for _, text, _ in samples]
    joint = sum("share" in text or "appears in" in text for text in texts) / len(texts)
    told = sum("answer " in text or "one sentence" in text for text in texts) / len(texts)
    assert joint == pytest.approx(0.15, abs=0.02)
    assert told == pytest.approx(0.35, abs=0.03)
    assert 0.08 < texts.count("describe this .") / len(texts) < 0.22
    assert any(text.endswith(OTHER_WORDS) for text in texts)


def test_the_vocabulary_is_sorted_unique_and_stable():
    words = vocabulary()
    assert words == sorted(set(words))
    assert vocabulary() == words
    assert set(LETTERS) <= set(words)
    assert {"crimson", "true", "3", "leaning", "melody", "frame"} <= set(words)
    assert len(words) < 400


@pytest.mark.parametrize("name", sorted(COMBINATIONS))
def test_combined_questions_have_one_right_option(name):
    stream, kinds = rng(0, "combined", name), set()
    for number in range(80):
        letter = LETTERS[number % 4]
        question = draw_combined(stream, "test", name, letter)
        assert tuple(question.scenes) == COMBINATIONS[name] and question.letter == letter
        kinds.add(question.kind)
        options = dict(zip(LETTERS, question.text.split(" ? ")[1].split()[1:8:2], strict=True))
        assert len(set(options.values())) == 4
        if question.kind == "color":
            shown = [colors_of(scene) for each, scene in question.scenes.items() if each != "audio"]
            assert [key for key, word in options.items() if all(COLORS.index(word) in s for s in shown)] == [letter]
            assert sum(any(COLORS.index(word) in s for s in shown) for word in options.values()) >= 2
        if question.kind == "number":
            assert options[letter] == NUMBERS[question.scenes["image"].count] == NUMBERS[question.scenes["audio"].count]
    needed = {
        "image": {"color", "number"},
        "video": {"color", "video"},
        "audio": {"number", "sound"},
        "point": {"color"},
    }
    assert all(kinds & needed[modality] for modality in COMBINATIONS[name])


@pytest.mark.parametrize("modality", MODALITIES)
def test_choices_over_one_scene_offer_words_of_one_kind(modality):
    stream = rng(0, "choice", modality)
    for _ in range(60):
        scene = draw(modality, stream)
        choice = draw_choice(scene, stream, "C")
        text, listed = choice.text.split(" ? ")
        answers = {question.text: question.answer for _ in range(8) for question in questions(scene, stream)}
        if f"{text} ?" in answers:
            assert listed.split()[5] == answers[f"{text} ?"]
