"""/v1/completions: answers, parameters as the backend sees them, choices, stop strings, logprobs."""

from __future__ import annotations

import pytest

from elastic_ep.brain.events import GenerationRequest, TokenEvent
from elastic_ep.brain.messages import SampledToken
from elastic_ep.serving.api.plan import choice_seed
from elastic_ep.serving.text import TextTokenizer, Tokenizer
from tests.serving.conftest import COMPLETIONS, Api
from tests.serving.fakes import FakeBackend, byte_level


def says(tokenizer: TextTokenizer, text: str, *, eos: bool = False) -> list[int]:
    """Ids of an answer long enough for any test."""
    ids = tokenizer.encode(text)
    return [*ids, *tokenizer.eos_ids, *([5] * 200)] if eos else [*ids, *([5] * 200)]


def test_defaults(api: Api) -> None:
    answer = api.complete(prompt="hello world")
    (request,) = api.backend.requests
    assert request.prompt_ids == tuple(api.tokenizer.encode("hello world"))
    assert request.max_tokens == 16
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.top_logprobs) == (1.0, 1.0, None)
    assert request.eos_ids == api.tokenizer.eos_ids
    (choice,) = answer["choices"]
    assert choice == {"index": 0, "text": choice["text"], "logprobs": None, "finish_reason": "length"}
    assert choice["text"].startswith("hello worldhello world")
    prompt_tokens = len(request.prompt_ids)
    assert answer["usage"] == {"prompt_tokens": prompt_tokens, "completion_tokens": 16, "total_tokens": prompt_tokens + 16}
    assert (answer["object"], answer["model"]) == ("text_completion", "tiny")
    assert api.backend.cancelled == []


def test_parameters_reach_the_backend(api: Api) -> None:
    api.complete(prompt=[1, 2], max_tokens=3, temperature=0, top_p=0.5, seed=-1, ignore_eos=True, logprobs=4, model="tiny")
    (request,) = api.backend.requests
    assert (request.prompt_ids, request.max_tokens, request.eos_ids) == ((1, 2), 3, frozenset())
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed, sampling.top_logprobs) == (0.0, 0.5, 2**64 - 1, 4)


def test_null_is_the_default(api: Api) -> None:
    names = ("model", "max_tokens", "temperature", "top_p", "seed", "n", "stop", "stream", "stream_options", "ignore_eos", "logprobs")
    answer = api.complete(prompt=[1, 2], return_token_ids=None, logit_bias=None, suffix=None, user=None, **dict.fromkeys(names))
    assert answer["usage"]["completion_tokens"] == 16


def test_whole_numbers_may_be_written_as_floats(api: Api) -> None:
    """2.0 is an integer to a JSON schema."""
    assert api.complete(prompt=[1], max_tokens=2.0, n=2.0, logprobs=1.0)["usage"]["completion_tokens"] == 4
    assert all(isinstance(r.max_tokens, int) for r in api.backend.requests)


def test_the_default_length_ends_at_the_context(tokenizer: TextTokenizer) -> None:
    api = Api(FakeBackend(max_model_len=10), tokenizer)
    assert api.complete(prompt=[1] * 7)["usage"]["completion_tokens"] == 3
    assert api.complete(prompt=[1] * 7, max_tokens=3)["usage"]["completion_tokens"] == 3


def test_eos_ends_the_answer_and_is_no_text(api: Api, tokenizer: TextTokenizer) -> None:
    api.backend.answer = lambda request: says(tokenizer, "hello fox", eos=True)
    answer = api.complete(prompt="x", max_tokens=50, return_token_ids=True)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("hello fox", "stop")
    ids = [*tokenizer.encode("hello fox"), *tokenizer.eos_ids]
    assert choice["token_ids"] == ids
    assert answer["usage"]["completion_tokens"] == len(ids)
    api.backend.cancelled.clear()
    assert api.complete(prompt="x", max_tokens=50, ignore_eos=True)["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hello", [[323]]),
        (["hello", "hello"], [[323], [323]]),
        ([3, 4], [[3, 4]]),
        ([[3], [4, 5]], [[3], [4, 5]]),
        ([3.0, 4], [[3, 4]]),
        ([[3], [4.0]], [[3], [4]]),
    ],
)
def test_prompt_kinds(api: Api, prompt: object, expected: list[list[int]]) -> None:
    answer = api.complete(prompt=prompt, max_tokens=2, return_token_ids=True)
    if isinstance(expected[0][0], int) and expected[0] == [323]:
        expected = [api.tokenizer.encode("hello")] * len(expected)
    assert [list(r.prompt_ids) for r in api.backend.requests] == expected
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == expected
    assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))


def test_choices_have_seeds_of_their_own_and_stay_in_order(api: Api) -> None:
    api.backend.answer = lambda request: [request.sampling.seed % 256] * 2
    answer = api.complete(prompt=[[1], [2]], n=3, seed=7, max_tokens=2, return_token_ids=True)
    seeds = [r.sampling.seed for r in api.backend.requests]
    assert seeds == [choice_seed(7, i) for i in range(3)] * 2
    assert seeds[0] == 7
    assert len(set(seeds)) == 3
    assert [c["index"] for c in answer["choices"]] == list(range(6))
    assert [c["token_ids"] for c in answer["choices"]] == [[s % 256] * 2 for s in seeds]
    assert [c["prompt_token_ids"] for c in answer["choices"]] == [[1]] * 3 + [[2]] * 3
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 12, "total_tokens": 14}
    assert len({r.request_id for r in api.backend.requests}) == 6


def test_choice_seeds_are_what_the_documentation_says() -> None:
    """SplitMix64 from 1234567: its published first outputs."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [choice_seed(1234567, i) for i in range(1, 6)] == published
    assert choice_seed(-1, 0) == 2**64 - 1


def test_seeds_are_drawn_where_none_is_given(api: Api) -> None:
    api.complete(prompt=[[1], [1]], max_tokens=1)
    api.complete(prompt=[1], max_tokens=1)
    seeds = {r.sampling.seed for r in api.backend.requests}
    assert len(seeds) == 3
    assert all(0 <= s < 2**64 for s in seeds)


@pytest.mark.parametrize("stop", ["brown", ["zzz", "wn f", "brown"]])
def test_stop_strings_cut_the_text_and_cancel_the_rest(api: Api, tokenizer: TextTokenizer, stop: object) -> None:
    api.backend.answer = lambda request: says(tokenizer, "the quick brown fox jumps")
    answer = api.complete(prompt="x", max_tokens=50, stop=stop, return_token_ids=True)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("the quick ", "stop")
    assert tokenizer.encode("the quick brown fox jumps")[: len(choice["token_ids"])] == choice["token_ids"]
    assert answer["usage"]["completion_tokens"] == len(choice["token_ids"])
    assert api.backend.cancelled == [api.backend.requests[0].request_id]


def test_an_eos_that_is_an_ordinary_token_is_no_text(tokenizer: TextTokenizer) -> None:
    hello, fox = tokenizer.encode("hello fox")[0], tokenizer.encode("fox")
    api = Api(FakeBackend(answer=lambda request: [hello, *fox]), TextTokenizer(byte_level(), eos_ids=frozenset((fox[0],))))
    (choice,) = api.complete(prompt="x", return_token_ids=True)["choices"]
    assert (choice["text"], choice["token_ids"], choice["finish_reason"]) == ("hello", [hello, fox[0]], "stop")


def test_a_stopped_choice_is_cancelled_while_the_others_go_on(api: Api, tokenizer: TextTokenizer) -> None:
    backend = api.backend
    cancelled_at: list[int] = []
    end = {"-0": "fox", "-1": "dog"}

    def answer(request: GenerationRequest) -> list[int]:
        return [*tokenizer.encode(end[request.request_id[-2:]] + " hello" * 150)][:100]

    class Watch(list[str]):
        def append(self, request_id: str) -> None:
            super().append(request_id)
            cancelled_at.append(backend.streams[1].position)

    backend.answer, backend.cancelled = answer, Watch()
    stopped, full = api.complete(prompt="x", n=2, max_tokens=100, stop="fox")["choices"]
    assert (stopped["finish_reason"], full["finish_reason"]) == ("stop", "length")
    assert backend.cancelled == [backend.requests[0].request_id]
    assert cancelled_at[0] < 100


def test_a_stop_string_at_the_very_end_counts(api: Api, tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("hello fox")
    api.backend.answer = lambda request: ids
    (choice,) = api.complete(prompt="x", max_tokens=len(ids), stop="x")["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("hello fo", "stop")
    (choice,) = api.complete(prompt="x", max_tokens=len(ids), stop="xy")["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("hello fox", "length")


def test_logprobs(api: Api, tokenizer: TextTokenizer) -> None:
    hello = tokenizer.encode("hello")[0]
    snow = tokenizer.encode("☃")
    tops = (((snow[0], -0.25), (hello, -1.5)), ((snow[0], -0.1), (snow[1], -2.0)), ((snow[1], float("-inf")), (5, -3.0)), ())

    def answer(request: GenerationRequest) -> list[TokenEvent]:
        ids = [hello, *snow]
        sampled = [SampledToken(0, t, -1.0 - i, tops[i]) for i, t in enumerate(ids)]
        return [TokenEvent(s, i, "length" if i == 3 else None) for i, s in enumerate(sampled)]

    api.backend.answer = answer
    (choice,) = api.complete(prompt="x", max_tokens=4, logprobs=1)["choices"]
    assert choice["text"] == "hello☃"
    assert choice["logprobs"] == {
        "tokens": ["hello", "bytes:\\xe2", "bytes:\\x98", "bytes:\\x83"],
        "token_logprobs": [-1.0, -2.0, -3.0, -4.0],
        "top_logprobs": [
            {"hello": -1.0, "bytes:\\xe2": -0.25},
            {"bytes:\\xe2": -0.1},
            {"bytes:\\x98": -9999.0},
            {"bytes:\\x83": -4.0},
        ],
        "text_offset": [0, 5, 5, 5],
    }
    streamed = api.stream(COMPLETIONS, prompt="x", max_tokens=4, logprobs=1)
    for name in choice["logprobs"]:
        assert [part["choices"][0]["logprobs"][name][0] for part in streamed] == choice["logprobs"][name]


def test_zero_logprobs_tell_the_sampled_token_alone(api: Api) -> None:
    (choice,) = api.complete(prompt="hello", max_tokens=1, logprobs=0)["choices"]
    assert choice["logprobs"]["top_logprobs"] == [{"hello": -0.5}]


def test_without_a_tokenizer_ids_are_the_answer() -> None:
    api = Api(FakeBackend(), Tokenizer(frozenset((9,))))
    (choice,) = api.complete(prompt=[1, 2], max_tokens=3, logprobs=1)["choices"]
    assert (choice["text"], choice["token_ids"], choice["prompt_token_ids"]) == ("", [1, 2, 1], [1, 2])
    assert choice["logprobs"]["tokens"] == ["token_id:1", "token_id:2", "token_id:1"]
    api.backend.answer = lambda request: [1, 9, 1]
    (choice,) = api.complete(prompt=[1, 2], max_tokens=3)["choices"]
    assert (choice["token_ids"], choice["finish_reason"]) == ([1, 9], "stop")
    assert api.refused(COMPLETIONS, prompt="hello")["message"].startswith("this checkpoint has no tokenizer: send the prompt as a list")
    assert api.refused("/v1/chat/completions", messages=[{"role": "user", "content": "hello"}])["param"] == "messages"
    assert api.refused(COMPLETIONS, prompt=[1], stop="x")["param"] == "stop"
