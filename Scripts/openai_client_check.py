#!/usr/bin/env python3
"""Checks a running Apus server with the official OpenAI client.

    python3 -m venv .venv && .venv/bin/pip install openai
    .venv/bin/python Scripts/openai_client_check.py http://127.0.0.1:8000/v1 [--api-key KEY]

Runs chat, tool calls, reasoning, streaming, completions, models, responses, files, batches and the mapping of errors to
the client's exception types. Prints one line per check and exits with 0 if all of them passed, else with 1. What needs a chat template is skipped where the model has
none; the wrong key is tried only if --api-key is given.
"""

import asyncio
import io
import json
import sys
import time
import typing

import openai
import pydantic

import client_check
from client_check import Skip, check


class Subject:
  """The server under test."""

  def __init__(self, url, key):
    self.url = url
    self.key = key
    self.client = self.make_client(key)
    self.model = self.client.models.list().data[0].id

  def make_client(self, key, **options):
    return openai.OpenAI(base_url=self.url, api_key=key or "none", max_retries=0, timeout=120, **options)

  def chat(self, **fields):
    fields = {
      "model": self.model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0,
      **fields
    }
    try:
      return self.client.chat.completions.create(**fields)
    except openai.BadRequestError as error:
      if "template" in str(error) and "messages" in fields:
        raise Skip("the model has no chat template") from error
      raise

  def complete(self, **fields):
    fields = {"model": self.model, "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0, **fields}
    return self.client.completions.create(**fields)


def expect_error(kind, status, call, code=None, parameter=None):
  """Runs a call that must raise the given exception of the client."""
  try:
    call()
  except kind as error:
    assert error.status_code == status, f"status {error.status_code}, expected {status}"
    assert error.body and error.body.get("message"), f"no message in {error.body}"
    if code is not None:
      assert error.code == code, f"code {error.code}, expected {code}"
    if parameter is not None:
      assert error.param == parameter, f"param {error.param}, expected {parameter}"
    assert error.request_id, "no request id"
    return error
  raise AssertionError(f"expected {kind.__name__}, but the call succeeded")


@check
def models(s):
  listed = s.client.models.list()
  assert listed.object == "list" and listed.data, listed
  model = s.client.models.retrieve(s.model)
  assert model.id == s.model and model.object == "model" and model.created > 0 and model.owned_by, model


@check
def unknown_model_is_not_found(s):
  expect_error(openai.NotFoundError, 404, lambda: s.client.models.retrieve("no-such-model"), "model_not_found")
  expect_error(
    openai.NotFoundError, 404, lambda: s.complete(model="no-such-model"), "model_not_found", "model")


@check
def completion(s):
  answer = s.complete()
  assert answer.object == "text_completion" and answer.model == s.model and answer.id, answer
  choice = answer.choices[0]
  assert choice.index == 0 and isinstance(choice.text, str) and choice.finish_reason in ("stop", "length"), choice
  usage = answer.usage
  assert usage.prompt_tokens > 0 and 0 < usage.completion_tokens <= 9, usage
  assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, usage
  assert usage.prompt_tokens_details.cached_tokens >= 0, usage


@check
def greedy_completion_repeats_itself(s):
  assert s.complete().choices[0].text == s.complete().choices[0].text


@check
def completion_of_several_prompts(s):
  answer = s.complete(prompt=["One", "Two", "Three"], n=2, max_tokens=2)
  assert [choice.index for choice in answer.choices] == list(range(6)), answer.choices


@check
def completion_of_token_ids(s):
  answer = s.complete(prompt=[1, 2, 3], max_tokens=2)
  assert answer.usage.prompt_tokens == 3, answer.usage
  answer = s.complete(prompt=[[1, 2], [3]], max_tokens=2)
  assert answer.usage.prompt_tokens == 3 and len(answer.choices) == 2, answer


@check
def completion_with_echo_and_logprobs(s):
  answer = s.complete(echo=True, logprobs=2, max_tokens=2)
  choice = answer.choices[0]
  assert choice.text.startswith("Once upon a time"), choice.text
  logprobs = choice.logprobs
  length = answer.usage.prompt_tokens + answer.usage.completion_tokens
  assert len(logprobs.tokens) == length, (len(logprobs.tokens), length)
  assert len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(logprobs.text_offset) == length
  assert logprobs.token_logprobs[0] is None and all(value <= 0 for value in logprobs.token_logprobs[1:]), logprobs


@check
def completion_with_best_of(s):
  answer = s.complete(best_of=3, n=2, temperature=1, max_tokens=2)
  assert len(answer.choices) == 2, answer.choices


@check
def completion_stream(s):
  whole = s.complete().choices[0].text
  text, reasons = "", []
  for chunk in s.complete(stream=True):
    for choice in chunk.choices:
      text += choice.text
      if choice.finish_reason:
        reasons.append(choice.finish_reason)
  assert text == whole, (text, whole)
  assert len(reasons) == 1, reasons


@check
def stop_string(s):
  whole = s.complete(max_tokens=12).choices[0].text
  middle = whole[len(whole) // 2: len(whole) // 2 + 3]
  if not middle:
    raise Skip("the answer is too short to be stopped within")
  answer = s.complete(max_tokens=12, stop=middle)
  assert middle not in answer.choices[0].text, answer
  assert answer.choices[0].finish_reason == "stop", answer


@check
def seeded_completion_repeats_itself(s):
  first = s.complete(temperature=1, seed=17, n=2)
  second = s.complete(temperature=1, seed=17, n=2)
  assert [c.text for c in first.choices] == [c.text for c in second.choices]
  assert first.system_fingerprint == second.system_fingerprint


@check
def sglang_extensions(s):
  answer = s.complete(
    max_tokens=4,
    extra_body={"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.1, "ignore_eos": True, "min_tokens": 2})
  assert answer.usage.completion_tokens == 4, answer.usage


@check
def vllm_extensions(s):
  constrained = s.complete(
    max_tokens=8, temperature=1, extra_body={"structured_outputs": {"choice": ["red", "blue"]}})
  assert constrained.choices[0].text in ("red", "blue"), constrained
  silent = s.chat(max_tokens=16, extra_body={"include_reasoning": False}).choices[0].message
  assert getattr(silent, "reasoning_content", None) is None, silent
  thoughtless = s.chat(max_tokens=16, extra_body={"thinking": {"type": "disabled"}}).choices[0].message
  assert getattr(thoughtless, "reasoning_content", None) is None, thoughtless
  expect_error(
    openai.BadRequestError, 400, lambda: s.chat(extra_body={"prompt_logprobs": 1}), code="unsupported_value",
    parameter="prompt_logprobs")


@check
def chat(s):
  answer = s.chat()
  assert answer.object == "chat.completion" and answer.id and answer.created > 0, answer
  message = answer.choices[0].message
  assert message.role == "assistant" and isinstance(message.content, str), message
  assert answer.choices[0].finish_reason in ("stop", "length"), answer
  assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens, answer.usage


@check
def chat_with_content_parts(s):
  text = [{"type": "text", "text": "Hello"}]
  assert s.chat(messages=[{"role": "user", "content": text}]).choices[0].message.content == \
    s.chat().choices[0].message.content


@check
def chat_stream(s):
  whole = s.chat().choices[0].message.content
  stream = s.chat(stream=True, stream_options={"include_usage": True})
  text, roles, reasons, usage = "", [], [], None
  for chunk in stream:
    assert chunk.object == "chat.completion.chunk", chunk
    if chunk.usage:
      assert not chunk.choices, chunk
      usage = chunk.usage
    for choice in chunk.choices:
      text += choice.delta.content or ""
      roles += [choice.delta.role] if choice.delta.role else []
      reasons += [choice.finish_reason] if choice.finish_reason else []
  assert text == whole, (text, whole)
  assert roles == ["assistant"] and len(reasons) == 1, (roles, reasons)
  assert usage and usage.completion_tokens > 0, usage


@check
def chat_with_several_choices(s):
  answer = s.chat(n=3, temperature=1, seed=1)
  assert [choice.index for choice in answer.choices] == [0, 1, 2], answer.choices
  indices = set()
  for chunk in s.chat(n=3, temperature=1, seed=1, stream=True):
    indices |= {choice.index for choice in chunk.choices}
  assert indices == {0, 1, 2}, indices


@check
def chat_logprobs(s):
  answer = s.chat(logprobs=True, top_logprobs=3, max_tokens=3)
  content = answer.choices[0].logprobs.content
  assert len(content) == answer.usage.completion_tokens, (len(content), answer.usage)
  for entry in content:
    assert entry.logprob <= 0 and entry.bytes is not None and len(entry.top_logprobs) == 3, entry
    assert entry.top_logprobs[0].logprob >= entry.top_logprobs[2].logprob, entry


@check
def async_streams_at_once(s):
  async def one(client):
    pieces = 0
    stream = await client.completions.create(model=s.model, prompt="Hi", max_tokens=8, stream=True)
    async for _ in stream:
      pieces += 1
    return pieces

  async def run():
    async with openai.AsyncOpenAI(base_url=s.url, api_key=s.key or "none", max_retries=2) as client:
      return await asyncio.gather(*[one(client) for _ in range(16)])

  assert all(pieces > 0 for pieces in asyncio.run(run()))


@check
def a_stream_left_early_is_no_error(s):
  stream = s.complete(max_tokens=64, stream=True)
  next(iter(stream))
  stream.close()
  s.complete(max_tokens=1)


@check
def bad_values_are_bad_requests(s):
  expect_error(openai.BadRequestError, 400, lambda: s.complete(temperature=-1), parameter="temperature")
  expect_error(openai.BadRequestError, 400, lambda: s.complete(temperature="hot"), parameter="temperature")
  expect_error(openai.BadRequestError, 400, lambda: s.complete(n=0), parameter="n")
  expect_error(openai.BadRequestError, 400, lambda: s.complete(prompt=[-1]))
  expect_error(openai.BadRequestError, 400, lambda: s.complete(best_of=1, n=2), parameter="best_of")
  expect_error(openai.BadRequestError, 400, lambda: s.complete(suffix="end"), parameter="suffix")
  expect_error(
    openai.BadRequestError, 400, lambda: s.chat(response_format={"type": "xml"}), parameter="response_format.type")
  image = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
  expect_error(openai.BadRequestError, 400, lambda: s.chat(messages=[{"role": "user", "content": image}]))
  expect_error(openai.BadRequestError, 400, lambda: s.chat(messages=[]), parameter="messages")


@check
def a_prompt_that_is_too_long_is_a_bad_request(s):
  limit = s.client.models.retrieve(s.model).max_model_len
  expect_error(
    openai.BadRequestError, 400, lambda: s.complete(prompt=[1] * (limit + 1)), code="context_length_exceeded")


@check
def unknown_paths_are_not_found(s):
  expect_error(openai.NotFoundError, 404, lambda: s.client.post("/no/such/path", cast_to=object, body={}))


@check
def a_wrong_key_is_unauthorized(s):
  if not s.key:
    raise Skip("no --api-key given")
  expect_error(
    openai.AuthenticationError, 401, lambda: s.make_client(s.key + "x").models.list(), code="invalid_api_key")


WEATHER = {
  "type": "function",
  "function": {
    "name": "get_weather", "description": "The weather in a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
  },
}
FORCED = {"type": "function", "function": {"name": "get_weather"}}


def forced_call(s, **fields):
  """A chat whose answer must be a call; skipped where the model's template shows no format of calls."""
  try:
    return s.chat(
      messages=[{"role": "user", "content": "What is the weather in Oslo?"}], tools=[WEATHER], tool_choice=FORCED,
      max_tokens=48, **fields)
  except openai.BadRequestError as error:
    if error.param == "tool_choice":
      raise Skip("the chat template shows no format of tool calls") from error
    raise


def arguments_of(choice):
  """The arguments of the call, which are whole JSON unless the answer broke off."""
  message = choice.message
  assert message.tool_calls, f"no tool call in {message}"
  call = message.tool_calls[0]
  assert call.type == "function" and call.id and call.function.name == "get_weather", call
  if choice.finish_reason == "tool_calls":
    assert isinstance(json.loads(call.function.arguments), dict), call
  return call.function.arguments


@check
def forced_tool_call(s):
  arguments_of(forced_call(s).choices[0])


@check
def streamed_tool_call_adds_up(s):
  whole = forced_call(s).choices[0]
  text = ""
  names, ids, reason = [], [], None
  for chunk in forced_call(s, stream=True):
    choice = chunk.choices[0]
    reason = choice.finish_reason or reason
    for call in choice.delta.tool_calls or []:
      if call.index != 0:
        continue
      if call.id:
        ids.append(call.id)
        names.append(call.function.name)
        assert call.type == "function" and call.function.arguments == "", call
      else:
        text += call.function.arguments
  assert names == ["get_weather"] and len(ids) == 1, (names, ids)
  assert text == arguments_of(whole), (text, whole)
  assert reason == whole.finish_reason, (reason, whole.finish_reason)


@check
def tool_results_are_taken(s):
  call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
  answer = s.chat(
    messages=[
      {"role": "developer", "content": "Be brief."}, {"role": "user", "content": "What is the weather in Oslo?"},
      {"role": "assistant", "content": None, "tool_calls": [call]},
      {"role": "tool", "tool_call_id": "call_1", "content": "Snow, -3 degrees."},
    ], tools=[WEATHER], parallel_tool_calls=False)
  assert answer.choices[0].message.role == "assistant"


@check
def tool_choice_none_gives_text(s):
  answer = s.chat(tools=[WEATHER], tool_choice="none").choices[0]
  assert not answer.message.tool_calls and answer.finish_reason in ("stop", "length"), answer


@check
def bad_tools_are_bad_requests(s):
  expect_error(openai.BadRequestError, 400, lambda: s.chat(tool_choice="required"), parameter="tool_choice")
  expect_error(
    openai.BadRequestError, 400, lambda: s.chat(tools=[{"type": "function", "function": {}}]),
    parameter="tools[0].function.name")


@check
def reasoning_is_separated(s):
  def texts(**fields):
    message = s.chat(max_tokens=32, extra_body=fields).choices[0].message
    return getattr(message, "reasoning_content", None) or "", message.content or ""

  reasoning, content = texts()
  _, joined = texts(separate_reasoning=False)
  assert reasoning.strip() in joined and content.strip() in joined, (reasoning, content, joined)
  streamed = ""
  for chunk in s.chat(max_tokens=32, stream=True):
    streamed += getattr(chunk.choices[0].delta, "reasoning_content", None) or ""
  assert streamed == reasoning, (streamed, reasoning)


def has_template(s):
  """Skips a check where the model has no chat template."""
  s.chat(max_tokens=1)


class Weather(pydantic.BaseModel):
  """The weather in a city."""

  city: typing.Literal["Oslo", "Rome", "Lima"]
  days: list[typing.Literal["today", "tomorrow"]] = pydantic.Field(max_length=2)


class Person(pydantic.BaseModel):
  # Bounded, so that the text is whole whatever the model writes.
  name: str = pydantic.Field(max_length=12)
  age: int = pydantic.Field(ge=0, le=150)


# Room for all that a grammar lets a model write: up to 128 bytes of whitespace wherever JSON may have some.
ROOM = 1200


def parsed_chat(s, **fields):
  return s.client.chat.completions.parse(
    **{"model": s.model, "messages": [{"role": "user", "content": "Extract: Bob is 7 years old."}], "temperature": 0,
       "max_tokens": ROOM, **fields})


@check
def chat_parses_into_a_model(s):
  has_template(s)
  answer = parsed_chat(s, response_format=Person)
  person = answer.choices[0].message.parsed
  assert isinstance(person, Person) and Person.model_validate_json(answer.choices[0].message.content) == person, answer


@check
def chat_streaming_helper(s):
  has_template(s)
  whole = parsed_chat(s, response_format=Person)
  text, done = "", None
  with s.client.chat.completions.stream(
    model=s.model, messages=[{"role": "user", "content": "Extract: Bob is 7 years old."}], temperature=0,
    max_tokens=ROOM, response_format=Person, stream_options={"include_usage": True}) as stream:
    for event in stream:
      if event.type == "content.delta":
        text += event.delta
        assert event.snapshot == text, event
      elif event.type == "content.done":
        done = event
    final = stream.get_final_completion()
  assert text == done.content == whole.choices[0].message.content, (text, done, whole)
  assert final.choices[0].message.parsed == done.parsed == whole.choices[0].message.parsed, (final, whole)
  assert final.usage.completion_tokens == whole.usage.completion_tokens, (final.usage, whole.usage)


def forced_tool(s, call):
  """Runs a call with a forced tool; skipped where the model's template shows no format of calls."""
  try:
    return call()
  except openai.BadRequestError as error:
    if error.param == "tool_choice":
      raise Skip("the chat template shows no format of tool calls") from error
    raise


@check
def chat_tool_loop(s):
  """A conversation that goes on until the model calls nothing more: at most four turns, the first call forced."""
  has_template(s)
  tools = [openai.pydantic_function_tool(Weather, name="get_weather")]
  messages = [{"role": "user", "content": "What is the weather in Oslo?"}]
  first = forced_tool(
    s, lambda: parsed_chat(s, messages=messages, tools=tools, tool_choice=FORCED, parallel_tool_calls=False))
  call = first.choices[0].message.tool_calls[0]
  assert isinstance(call.function.parsed_arguments, Weather), call
  choice = first.choices[0]
  for _ in range(3):
    messages.append(choice.message)
    for call in choice.message.tool_calls or []:
      messages.append({"role": "tool", "tool_call_id": call.id, "content": "Snow, -3 degrees."})
    if not choice.message.tool_calls:
      break
    choice = s.chat(messages=messages, tools=tools, max_tokens=64).choices[0]
    assert choice.message.content or choice.message.tool_calls or choice.message.model_extra, choice
  print("      the loop's last turn:", choice.message.model_dump(exclude_none=True))


@check
def chat_streaming_helper_with_tools(s):
  has_template(s)
  tools = [openai.pydantic_function_tool(Weather, name="get_weather")]
  fields = {"messages": [{"role": "user", "content": "What is the weather in Oslo?"}], "tools": tools,
            "tool_choice": FORCED, "parallel_tool_calls": False}
  whole = forced_tool(s, lambda: parsed_chat(s, **fields)).choices[0].message.tool_calls[0].function
  text, done = "", []
  with s.client.chat.completions.stream(model=s.model, temperature=0, max_tokens=ROOM, **fields) as stream:
    for event in stream:
      if event.type == "tool_calls.function.arguments.delta":
        text += event.arguments_delta
      elif event.type == "tool_calls.function.arguments.done":
        done.append(event)
    final = stream.get_final_completion()
  assert [event.name for event in done] == ["get_weather"], done
  assert text == done[0].arguments == whole.arguments, (text, done, whole)
  assert done[0].parsed_arguments == whole.parsed_arguments, (done, whole)
  assert final.choices[0].message.tool_calls[0].function.parsed_arguments == whole.parsed_arguments, final


def respond(s, **fields):
  """A response to a question."""
  fields = {"model": s.model, "input": "What is the capital of France?", "max_output_tokens": 32, "temperature": 0,
            **fields}
  return s.client.responses.create(**fields)


@check
def responses(s):
  has_template(s)
  answer = respond(s, metadata={"a": "b"}, instructions="Be brief.")
  assert answer.object == "response" and answer.status in ("completed", "incomplete"), answer
  assert answer.output_text and answer.error is None and answer.metadata == {"a": "b"}, answer
  assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens, answer.usage
  kept = s.client.responses.retrieve(answer.id)
  assert kept == answer, (kept, answer)
  items = list(s.client.responses.input_items.list(answer.id))
  assert len(items) == 1 and items[0].content[0].text == "What is the capital of France?", items
  s.client.responses.delete(answer.id)
  expect_error(openai.NotFoundError, 404, lambda: s.client.responses.retrieve(answer.id), code="not_found")


@check
def responses_stream(s):
  has_template(s)
  whole = respond(s)
  text, numbers, types = "", [], []
  for event in respond(s, stream=True):
    numbers.append(event.sequence_number)
    types.append(event.type)
    if event.type == "response.output_text.delta":
      text += event.delta
  assert text == whole.output_text, (text, whole.output_text)
  assert numbers == list(range(len(numbers))), numbers
  assert types[:2] == ["response.created", "response.in_progress"], types
  assert types[-1] == "response." + whole.status, types
  # The client's own helper puts the events together and checks that they fit.
  with s.client.responses.stream(
    model=s.model, input="What is the capital of France?", max_output_tokens=32, temperature=0) as stream:
    for event in stream:
      pass
    if whole.status == "completed":
      assert stream.get_final_response().output_text == whole.output_text


@check
def responses_follow_each_other(s):
  has_template(s)
  first = respond(s, input="My name is Ada.")
  second = respond(s, input="What is my name?", previous_response_id=first.id)
  assert second.previous_response_id == first.id, second
  spelt = respond(s, input=[
    {"role": "user", "content": "My name is Ada."}, {"role": "assistant", "content": first.output_text},
    {"role": "user", "content": "What is my name?"}])
  assert second.output_text == spelt.output_text, (second.output_text, spelt.output_text)
  assert second.usage.input_tokens == spelt.usage.input_tokens, (second.usage, spelt.usage)
  expect_error(
    openai.NotFoundError, 404, lambda: respond(s, previous_response_id="resp_none"), parameter="previous_response_id")


@check
def responses_parse_into_a_model(s):
  has_template(s)
  answer = s.client.responses.parse(
    model=s.model, input="Extract: Bob is 7 years old.", text_format=Person, temperature=0,
    max_output_tokens=ROOM)
  assert answer.status == "completed", answer
  assert isinstance(answer.output_parsed, Person), answer.output
  assert answer.text.format.name == "Person", answer.text


@check
def responses_streaming_helper(s):
  has_template(s)
  fields = {"model": s.model, "input": "Extract: Bob is 7 years old.", "temperature": 0, "max_output_tokens": ROOM,
            "text_format": Person}
  whole = s.client.responses.parse(**fields)
  text = ""
  with s.client.responses.stream(**fields) as stream:
    for event in stream:
      if event.type == "response.output_text.delta":
        text += event.delta
        assert event.snapshot == text, event
    final = stream.get_final_response()
  assert text == whole.output_text and isinstance(final.output_parsed, Person), (final, whole)
  assert final.output_parsed == whole.output_parsed, (final, whole)


@check
def responses_tool_loop(s):
  """A streamed conversation that goes on until the model calls nothing more: at most four turns, the first call forced."""
  has_template(s)
  tools = [openai.pydantic_function_tool(Weather, name="get_weather")]
  choice = {"type": "function", "name": "get_weather"}
  previous, items, calls = None, "What is the weather in Oslo?", 0

  def turn():
    with s.client.responses.stream(
      model=s.model, input=items, previous_response_id=previous, tools=tools, tool_choice=choice, temperature=0,
      parallel_tool_calls=False, max_output_tokens=64 if calls else ROOM) as stream:
      for event in stream:
        last = event
    assert last.type in ("response.completed", "response.incomplete"), last
    return last.response

  for _ in range(4):
    answer = forced_tool(s, turn)
    choice = "auto"
    items = [
      {"type": "function_call_output", "call_id": item.call_id, "output": "Snow, -3 degrees."}
      for item in answer.output if item.type == "function_call"
    ]
    if calls == 0:
      first = [item for item in answer.output if item.type == "function_call"]
      assert len(first) == 1 and Weather.model_validate_json(first[0].arguments), answer
    calls += len(items)
    previous = answer.id
    if not items:
      break
  assert calls > 0


@check
def responses_call_tools(s):
  has_template(s)
  tool = {"type": "function", **WEATHER["function"], "strict": False}
  try:
    answer = respond(
      s, input="What is the weather in Oslo?", tools=[tool], max_output_tokens=64,
      tool_choice={"type": "function", "name": "get_weather"})
  except openai.BadRequestError as error:
    if error.param == "tool_choice":
      raise Skip("the chat template shows no format of tool calls") from error
    raise
  calls = [item for item in answer.output if item.type == "function_call"]
  assert calls and calls[0].name == "get_weather" and calls[0].call_id, answer.output
  if answer.status == "completed":
    assert isinstance(json.loads(calls[0].arguments), dict), calls
  # The loop closes: the call's result is taken under its id.
  final = respond(
    s, previous_response_id=answer.id, tools=[tool],
    input=[{"type": "function_call_output", "call_id": calls[0].call_id, "output": "Snow, -3 degrees."}])
  assert final.output, final


@check
def responses_in_the_background(s):
  has_template(s)
  answer = respond(s, background=True)
  assert answer.status == "queued", answer
  deadline = time.time() + 60
  while answer.status in ("queued", "in_progress"):
    assert time.time() < deadline, answer
    time.sleep(0.05)
    answer = s.client.responses.retrieve(answer.id)
  assert answer.output_text == respond(s).output_text, answer
  long = respond(s, background=True, max_output_tokens=1500, input="Count.", extra_body={"ignore_eos": True})
  cancelled = s.client.responses.cancel(long.id)
  assert cancelled.status in ("cancelled", "incomplete"), cancelled


@check
def responses_stream_in_the_background(s):
  has_template(s)
  whole = respond(s)
  events = list(respond(s, background=True, stream=True))
  assert [event.sequence_number for event in events] == list(range(len(events))), events
  assert [event.type for event in events[:3]] == ["response.created", "response.queued", "response.in_progress"], events
  assert events[-1].response.output_text == whole.output_text, (events[-1], whole)
  # A client that was cut off goes on where it was, while the response is made or afterwards.
  stream = respond(s, background=True, stream=True)
  begun = [next(iter(stream)) for _ in range(3)]
  stream.close()
  name = begun[0].response.id
  rest = list(s.client.responses.retrieve(name, stream=True, starting_after=begun[-1].sequence_number))
  text = "".join(event.delta for event in begun + rest if event.type == "response.output_text.delta")
  assert text == whole.output_text, (begun, rest)
  assert s.client.responses.retrieve(name).output_text == text


@check
def responses_count_their_input(s):
  has_template(s)
  fields = {"model": s.model, "input": "What is the capital of France?", "instructions": "Be brief."}
  count = s.client.responses.input_tokens.count(**fields)
  assert count.object == "response.input_tokens", count
  assert count.input_tokens == respond(s, **fields).usage.input_tokens, count


@check
def responses_take_references(s):
  has_template(s)
  first = respond(s, input="My name is Ada.")
  asked = list(s.client.responses.input_items.list(first.id))[0]
  second = respond(s, input=[
    {"type": "item_reference", "id": asked.id}, {"type": "item_reference", "id": first.output[-1].id},
    {"role": "user", "content": "What is my name?"}])
  assert second.output_text == respond(s, input="What is my name?", previous_response_id=first.id).output_text
  expect_error(
    openai.NotFoundError, 404, lambda: respond(s, input=[{"type": "item_reference", "id": "msg_none"}]),
    parameter="input[0].id")


@check
def conversations(s):
  has_template(s)
  items = s.client.conversations.items
  made = s.client.conversations.create(
    metadata={"topic": "names"}, items=[{"type": "message", "role": "user", "content": "My name is Ada."}])
  assert made.object == "conversation" and made.metadata == {"topic": "names"}, made
  assert s.client.conversations.retrieve(made.id) == made
  assert s.client.conversations.update(made.id, metadata={}).metadata == {}
  first = respond(s, input="What is my name?", conversation=made.id)
  assert first.conversation.id == made.id, first
  listed = list(items.list(made.id, order="asc", limit=2))
  assert [item.type for item in listed][:2] == ["message", "message"], listed
  assert listed[1].content[0].text == "What is my name?" and listed[-1].id == first.output[-1].id, listed
  spelt = respond(s, input=[
    {"role": "user", "content": "My name is Ada."}, {"role": "user", "content": "What is my name?"},
    *[item.to_dict() for item in first.output], {"role": "user", "content": "And yours?"}])
  second = respond(s, input="And yours?", conversation={"id": made.id})
  assert second.output_text == spelt.output_text, (second, spelt)
  added = items.create(made.id, items=[{"type": "message", "role": "user", "content": "Thank you."}])
  item = added.data[0]
  assert items.retrieve(item.id, conversation_id=made.id) == item, item
  assert items.delete(item.id, conversation_id=made.id).id == made.id
  expect_error(openai.NotFoundError, 404, lambda: items.retrieve(item.id, conversation_id=made.id), parameter="item_id")
  assert s.client.conversations.delete(made.id).deleted
  expect_error(
    openai.NotFoundError, 404, lambda: respond(s, conversation=made.id), parameter="conversation")


@check
def bad_responses_are_bad_requests(s):
  expect_error(openai.BadRequestError, 400, lambda: respond(s, temperature=-1), parameter="temperature")
  expect_error(openai.BadRequestError, 400, lambda: respond(s, input=[]), parameter="input")
  expect_error(
    openai.BadRequestError, 400, lambda: respond(s, tools=[{"type": "web_search"}]), parameter="tools[0].type")
  expect_error(openai.NotFoundError, 404, lambda: respond(s, model="no-such-model"), "model_not_found", "model")


@check
def files(s):
  content = b"line one\r\n\x00\xff" * 1000
  made = s.client.files.create(file=("data.bin", io.BytesIO(content)), purpose="user_data")
  assert made.bytes == len(content) and made.filename == "data.bin" and made.status == "processed", made
  assert s.client.files.retrieve(made.id) == made
  assert s.client.files.content(made.id).read() == content
  assert made.id in [file.id for file in s.client.files.list(purpose="user_data")]
  assert s.client.files.delete(made.id).deleted
  expect_error(openai.NotFoundError, 404, lambda: s.client.files.retrieve(made.id), parameter="file_id")
  expect_error(
    openai.BadRequestError, 400, lambda: s.client.files.create(file=("a", b"x"), purpose="fun"), parameter="purpose")


def run_batch(s, lines, endpoint):
  """Runs a batch and returns it with the lines of its output and error files, by custom_id."""
  text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
  file = s.client.files.create(file=("in.jsonl", text.encode()), purpose="batch")
  batch = s.client.batches.create(
    input_file_id=file.id, endpoint=endpoint, completion_window="24h", metadata={"k": "v"})
  assert batch.status == "validating" and batch.metadata == {"k": "v"}, batch
  deadline = time.time() + 120
  while batch.status not in ("completed", "failed", "expired", "cancelled"):
    assert time.time() < deadline, batch
    time.sleep(0.05)
    batch = s.client.batches.retrieve(batch.id)
  assert batch.id in [one.id for one in s.client.batches.list(limit=5).data], batch
  results = []
  for name in (batch.output_file_id, batch.error_file_id):
    text = s.client.files.content(name).text if name else ""
    results.append({line["custom_id"]: line for line in map(json.loads, text.splitlines())})
  return batch, results[0], results[1]


@check
def batches(s):
  def line(name, **body):
    body = {"model": s.model, "prompt": name, "max_tokens": 4, "temperature": 0, **body}
    return {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body}

  names = [f"story {index}" for index in range(20)]
  batch, output, errors = run_batch(
    s, [line(name) for name in names] + ["{broken", line("bad", temperature=-1)], "/v1/completions")
  assert batch.status == "completed", batch
  counts = batch.request_counts
  assert (counts.total, counts.completed, counts.failed) == (22, 20, 2), counts
  assert list(output) == names, list(output)
  for name in names[:3]:
    text = s.complete(prompt=name, max_tokens=4).choices[0].text
    assert output[name]["response"]["body"]["choices"][0]["text"] == text, (name, output[name])
  assert errors[None]["error"]["code"] == "invalid_json_line", errors
  assert errors["bad"]["response"]["status_code"] == 400, errors


@check
def batches_of_other_endpoints(s):
  has_template(s)
  messages = [{"role": "user", "content": "Hello"}]
  for endpoint, body in [
    ("/v1/chat/completions", {"messages": messages, "max_tokens": 4}),
    ("/v1/responses", {"input": "Hello", "max_output_tokens": 4}),
  ]:
    line = {"custom_id": "a", "method": "POST", "url": endpoint, "body": {"model": s.model, **body}}
    batch, output, _ = run_batch(s, [line], endpoint)
    assert batch.status == "completed" and output["a"]["response"]["status_code"] == 200, (batch, output)


@check
def bad_batches_are_bad_requests(s):
  def create(**fields):
    return s.client.batches.create(
      **{"input_file_id": "file-none", "endpoint": "/v1/completions", "completion_window": "24h", **fields})

  expect_error(openai.NotFoundError, 404, create, parameter="input_file_id")
  expect_error(openai.BadRequestError, 400, lambda: create(endpoint="/generate"), parameter="endpoint")
  file = s.client.files.create(file=("a.jsonl", b"{}"), purpose="user_data")
  expect_error(openai.BadRequestError, 400, lambda: create(input_file_id=file.id), parameter="input_file_id")
  expect_error(openai.NotFoundError, 404, lambda: s.client.batches.retrieve("batch_none"))


if __name__ == "__main__":
  sys.exit(client_check.main(__doc__, f"openai {openai.__version__}", Subject, "http://127.0.0.1:8000/v1"))
