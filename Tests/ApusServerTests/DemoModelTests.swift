import ApusCore
import ApusEngine
import ApusServer
import ApusStore
import Foundation
import Testing

let demoModel = URL(fileURLWithPath: #filePath).deletingLastPathComponent()
  .appendingPathComponent("../../Models/apus-demo").standardizedFileURL.path

/// The routes of a server whose model is the demo model.
private func withDemo<Value: Sendable>(_ body: @Sendable (RouteClient) async throws -> Value) async throws -> Value {
  try await withDemo { client, _ in try await body(client) }
}

private func withDemo<Value: Sendable>(
  _ body: @Sendable (RouteClient, Engine) async throws -> Value
) async throws -> Value {
  var configuration = EngineConfiguration(modelPath: demoModel)
  configuration.maxTotalTokens = 8192
  return try await withEngine(configuration) { engine in
    try await withStore(engine) { client, _ in try await body(client, engine) }
  }
}

private func user(_ text: String) -> JSONValue { ["role": "user", "content": .string(text)] }

/// A message as the demo model's template writes it, ready for the answer.
private func prompt(_ text: String) -> String { "<|im_start|>user\n\(text)<|im_end|>\n<|im_start|>assistant\n" }

private func donkey(_ colour: String) -> String {
  "Story: Victor is a baker. Victor owns a \(colour) donkey. Jonas lives in Ashford.\n"
    + "Question: What colour is the donkey?"
}

private let colours = ["blue", "green", "red", "brown"]

private let person = "Jonas is 17 years old and lives in Birchley.\nReturn JSON with name, age and town."
private let personValue: JSONValue = ["name": "Jonas", "age": 17, "town": "Birchley"]
private let personSchema: JSONValue = [
  "type": "object",
  "properties": [
    "name": ["type": "string", "maxLength": 20], "age": ["type": "integer"],
    "town": ["type": "string", "maxLength": 20],
  ],
  "required": ["name", "age", "town"], "additionalProperties": false,
]

private let stock: JSONValue = [
  "name": "get_stock", "description": "Count how much food is left.",
  "parameters": ["type": "object", "properties": ["food": ["type": "string"]], "required": ["food"]],
]
private let buy: JSONValue = [
  "name": "buy",
  "parameters": [
    "type": "object", "properties": ["item": ["type": "string"], "quantity": ["type": "integer"]],
    "required": ["item", "quantity"],
  ],
]
private let tools: JSONValue = [["type": "function", "function": stock], ["type": "function", "function": buy]]

/// A message put together from the events of a stream: its text, its reasoning and its one call.
private struct Streamed {
  var content = ""
  var reasoning = ""
  var name = ""
  var arguments = ""
  var finish: JSONValue?
  /// Whether all of the reasoning came before the first text.
  var isOrdered = true

  init(_ answer: Answer) throws {
    for event in answer.events where event != "[DONE]" {
      let choice = try JSONValue.parse(event)["choices"]?[0]
      let delta = choice?["delta"]
      if let text = delta?["reasoning_content"]?.stringValue {
        reasoning += text
        if !content.isEmpty { isOrdered = false }
      }
      content += delta?["content"]?.stringValue ?? ""
      name += delta?["tool_calls"]?[0]?["function"]?["name"]?.stringValue ?? ""
      arguments += delta?["tool_calls"]?[0]?["function"]?["arguments"]?.stringValue ?? ""
      finish = choice?["finish_reason"]?.nonNull ?? finish
    }
  }
}

/// What the protocols are for, on weights that understand what they are asked: `FakeService` shows their shapes.
@Suite("The demo model behind the server", .serialized) struct DemoModelTests {
  /// The message of an answer to a conversation.
  @Sendable private func ask(
    _ client: RouteClient, _ messages: [JSONValue], _ members: JSONValue = [:]
  ) async throws -> Answer {
    let body: JSONValue = ["messages": .array(messages), "temperature": 0, "max_tokens": 120]
    let answer = try await client.post("/v1/chat/completions", with(body, members))
    #expect(answer.status == 200, "\(answer.text)")
    return answer
  }

  @Sendable private func text(_ answer: Answer) -> String {
    answer.json["choices"]?[0]?["message"]?["content"]?.stringValue ?? ""
  }

  @Test("A question calls the tool that it is for with its own words, and the result becomes the answer")
  func toolLoop() async throws {
    try await withDemo { client in
      for (question, name, arguments) in [
        ("How many oranges are left?", "get_stock", ["food": "oranges"]),
        ("Buy 12 pillows.", "buy", ["item": "pillows", "quantity": 12]),
      ] as [(String, String, JSONValue)] {
        for members in [[:], ["tool_choice": "required"]] as [JSONValue] {
          let asked = with(["tools": tools], members)
          let answer = try await ask(client, [user(question)], asked)
          let message = answer.json["choices"]?[0]?["message"]
          #expect(answer.json["choices"]?[0]?["finish_reason"] == "tool_calls")
          #expect(message?["tool_calls"]?.arrayValue?.count == 1 && message?["content"] == .null, "\(answer.text)")
          let call = try #require(message?["tool_calls"]?[0]?["function"])
          #expect(call["name"]?.stringValue == name)
          #expect(try JSONValue.parse(call["arguments"]?.stringValue ?? "") == arguments)
          let streamed = try Streamed(try await ask(client, [user(question)], with(asked, ["stream": true])))
          #expect(streamed.name == name && streamed.arguments == call["arguments"]?.stringValue)
          #expect(streamed.finish == "tool_calls" && streamed.content.isEmpty)
        }
      }
      // Another tool than the one it would take, and none.
      let named: JSONValue = ["type": "function", "function": ["name": "buy"]]
      let forced = try await ask(client, [user("How many oranges are left?")], ["tools": tools, "tool_choice": named])
      let call = try #require(forced.json["choices"]?[0]?["message"]?["tool_calls"]?[0]?["function"])
      #expect(call["name"] == "buy")
      let arguments = try JSONValue.parse(call["arguments"]?.stringValue ?? "")
      #expect(arguments["item"] == "oranges" && arguments["quantity"]?.intValue != nil, "\(arguments)")
      let none = try await ask(client, [user("How many oranges are left?")], ["tools": tools, "tool_choice": "none"])
      #expect(none.json["choices"]?[0]?["message"]?["tool_calls"]?.nonNull == nil)

      // The result, in OpenAI's words and in Anthropic's.
      for left in [74, 52] {
        let found = JSONValue.string("{\"left\": \(left)}")
        let first = try await ask(client, [user("How many oranges are left?")], ["tools": tools])
        let message = try #require(first.json["choices"]?[0]?["message"])
        let result: JSONValue = [
          "role": "tool", "tool_call_id": message["tool_calls"]![0]!["id"]!, "content": found,
        ]
        let second = try await ask(client, [user("How many oranges are left?"), message, result], ["tools": tools])
        #expect(text(second).contains("\(left)"), "\(second.text)")
        #expect(second.json["choices"]?[0]?["finish_reason"] == "stop")
        // The tools and the question were computed for the first answer.
        let known = first.json["usage"]?["prompt_tokens"]?.intValue ?? 0
        #expect(second.json["usage"]?["prompt_tokens_details"]?["cached_tokens"]?.intValue ?? 0 >= known - 16)

        func anthropic(_ messages: [JSONValue]) async throws -> JSONValue {
          let answer = try await client.post(
            "/v1/messages",
            [
              "messages": .array(messages), "max_tokens": 60, "temperature": 0,
              "tools": [
                ["name": "get_stock", "description": stock["description"]!, "input_schema": stock["parameters"]!],
                ["name": "buy", "input_schema": buy["parameters"]!],
              ],
            ])
          #expect(answer.status == 200, "\(answer.text)")
          return answer.json
        }
        let use = try await anthropic([user("How many oranges are left?")])
        let block = try #require(use["content"]?[0])
        #expect(use["stop_reason"] == "tool_use" && block["type"] == "tool_use", "\(use)")
        #expect(block["name"] == "get_stock" && block["input"] == ["food": "oranges"])
        let read = try await anthropic([
          user("How many oranges are left?"), ["role": "assistant", "content": use["content"]!],
          [
            "role": "user",
            "content": [["type": "tool_result", "tool_use_id": block["id"]!, "content": found]],
          ],
        ])
        #expect(read["content"]?[0]?["text"]?.stringValue == text(second) && read["stop_reason"] == "end_turn")
      }
    }
  }

  @Test("Worked steps are the reasoning and the sum is the answer, in every protocol; a cut thought still ends")
  func reasoning() async throws {
    try await withDemo { client in
      let question = [user("What is 89 + 35?")]
      let whole = try await ask(client, question)
      #expect(text(whole) == "89 + 35 = 124", "\(whole.text)")
      let steps = whole.json["choices"]?[0]?["message"]?["reasoning_content"]?.stringValue ?? ""
      #expect(steps.contains("9 + 5 = 14") && !steps.contains("think"), "\(steps)")
      let streamed = try Streamed(try await ask(client, question, ["stream": true]))
      #expect(streamed.reasoning == steps && streamed.content == text(whole) && streamed.isOrdered)
      #expect(streamed.finish == "stop")
      let joined = try await ask(client, question, ["separate_reasoning": false])
      #expect(text(joined).hasPrefix("<think>\n\(steps)") && text(joined).hasSuffix("</think>\n\n89 + 35 = 124"))

      let response = try await client.post("/v1/responses", ["input": "What is 89 + 35?", "temperature": 0])
      #expect(response.json["output"]?[0]?["content"]?[0]?["text"]?.stringValue == steps, "\(response.text)")
      #expect(response.json["output"]?[1]?["content"]?[0]?["text"]?.stringValue == text(whole))
      let body: JSONValue = ["messages": .array(question), "max_tokens": 120, "temperature": 0]
      let message = try await client.post("/v1/messages", body)
      #expect(message.json["content"]?[0]?["thinking"]?.stringValue == steps, "\(message.text)")
      #expect(message.json["content"]?[1]?["text"]?.stringValue == text(whole))
      #expect(message.json["stop_reason"] == "end_turn")
      let ollama = try await client.post(
        "/api/chat", ["messages": .array(question), "stream": false, "options": ["temperature": 0]])
      #expect(ollama.json["message"]?["thinking"]?.stringValue == steps, "\(ollama.text)")
      #expect(ollama.json["message"]?["content"]?.stringValue == text(whole) && ollama.json["done_reason"] == "stop")

      // Without reasoning there is none, and the answer is of the same form.
      let plain = try await ask(client, question, ["chat_template_kwargs": ["enable_thinking": false]])
      #expect(plain.json["choices"]?[0]?["message"]?["reasoning_content"]?.nonNull == nil)
      #expect(text(plain).hasPrefix("89 + 35 = "))
      // A budget cuts the same thought short, and what follows is still an answer that ends by itself.
      for budget in [3, 6] {
        let cut = try await ask(client, question, ["thinking_budget": .int(Int64(budget))])
        let thought = cut.json["choices"]?[0]?["message"]?["reasoning_content"]?.stringValue ?? ""
        #expect(!thought.isEmpty && steps.hasPrefix(thought) && thought != steps, "\(cut.text)")
        #expect(text(cut).hasPrefix("89 + 35 = ") && cut.json["choices"]?[0]?["finish_reason"] == "stop")
      }
    }
  }

  @Test("Each turn is answered rightly and computes only what is new, however the conversation is kept")
  func turns() async throws {
    let story = "Story: Victor is a baker. Victor owns a blue donkey. Jonas lives in Ashford. Jonas loves rice."
    let turns = [
      ("\(story)\nQuestion: What does Victor work as?", "baker"), ("In which town does Jonas live?", "Ashford"),
      ("What colour is the donkey?", "blue"),
    ]
    let answers = try await withDemo { client, engine in
      let made = try await client.post("/v1/conversations", [:])
      let conversation = try #require(made.json["id"])
      var all: [[String]] = []
      for way in ["messages", "previous response", "conversation"] {
        #expect(await engine.flushCache(timeout: 10))
        var (messages, known, previous, texts) = ([JSONValue](), 0, JSONValue?.none, [String]())
        for (question, word) in turns {
          let (answer, text): (JSONValue, String)
          let usage: (prompt: Int?, cached: Int?, written: Int?)
          if way == "messages" {
            messages.append(user(question))
            let got = try await ask(client, messages)
            (answer, text) = (got.json, self.text(got))
            messages.append(["role": "assistant", "content": .string(text)])
            usage = (
              answer["usage"]?["prompt_tokens"]?.intValue,
              answer["usage"]?["prompt_tokens_details"]?["cached_tokens"]?.intValue,
              answer["usage"]?["completion_tokens"]?.intValue
            )
          } else {
            var body = JSONObject([("input", .string(question)), ("temperature", 0)])
            if way == "conversation" {
              body["conversation"] = conversation
            } else {
              body["previous_response_id"] = previous
            }
            answer = try await client.post("/v1/responses", .object(body)).json
            previous = answer["id"]
            text = answer["output"]?[0]?["content"]?[0]?["text"]?.stringValue ?? ""
            usage = (
              answer["usage"]?["input_tokens"]?.intValue,
              answer["usage"]?["input_tokens_details"]?["cached_tokens"]?.intValue,
              answer["usage"]?["output_tokens"]?.intValue
            )
          }
          #expect(text.contains(word), "\(way): \(question) \(answer)")
          // Whole pages of what came before, the mark that opens an answer aside.
          let cached = try #require(usage.cached)
          #expect(known == 0 ? cached == 0 : cached >= (known - 16) / 16 * 16, "\(way): \(cached) of \(known)")
          known = (usage.prompt ?? 0) + (usage.written ?? 0)
          texts.append(text)
        }
        all.append(texts)
      }
      return all
    }
    #expect(answers[1] == answers[0] && answers[2] == answers[0])
  }

  @Test("Whatever the field that constrains it, the answer is the right one among those allowed")
  func constraints() async throws {
    let tag: JSONValue = [
      "type": "sequence",
      "elements": [
        ["type": "const_string", "value": "The donkey is "], ["type": "regex", "pattern": "[a-z]{3,8}"],
        ["type": "const_string", "value": "."],
      ],
    ]
    let schema: JSONValue = ["type": "json_schema", "json_schema": ["name": "person", "schema": personSchema]]
    try await withDemo { client in
      for colour in ["blue", "green"] {
        let right = "The donkey is \(colour)."
        for members in [
          ["regex": #"The (donkey|baker) is (red|green|blue|brown)\."#],
          ["ebnf": #"root ::= "The " ("cat" | "donkey") " is " [a-z]+ ".""#],
          ["guided_choice": ["A cat.", "The donkey is green.", "The donkey is blue."]],
          ["structured_outputs": ["choice": ["The donkey is green.", "The donkey is blue.", "No."]]],
          ["response_format": ["type": "structural_tag", "format": tag]],
        ] as [JSONValue] {
          let answer = try await ask(client, [user(donkey(colour))], members)
          #expect(text(answer) == right && answer.json["choices"]?[0]?["finish_reason"] == "stop", "\(members)")
        }
      }
      for format in [schema, ["type": "json_object"]] as [JSONValue] {
        let answer = try await ask(client, [user(person)], ["response_format": format])
        #expect(try JSONValue.parse(text(answer)) == personValue, "\(answer.text)")
      }
      let format: JSONValue = ["type": "json_schema", "name": "person", "schema": personSchema]
      let response = try await client.post(
        "/v1/responses", ["input": .string(person), "temperature": 0, "text": ["format": format]])
      let written = response.json["output"]?[0]?["content"]?[0]?["text"]?.stringValue ?? ""
      #expect(try JSONValue.parse(written) == personValue, "\(response.text)")
      let native = try await client.post(
        "/generate",
        [
          "text": .string(prompt(person)),
          "sampling_params": ["temperature": 0, "json_schema": .string(personSchema.compactText)],
        ])
      #expect(try JSONValue.parse(native.json["text"]?.stringValue ?? "") == personValue, "\(native.text)")
      // After worked steps, too, and the steps are free.
      let sum = try await ask(client, [user("What is 89 + 35?")], ["regex": #"89 \+ 35 = [0-9]{2,3}"#])
      #expect(text(sum) == "89 + 35 = 124")
      #expect(sum.json["choices"]?[0]?["message"]?["reasoning_content"]?.stringValue?.contains("14") == true)
    }
  }

  @Test("Every line of a batch and every prompt of a list gets its own right answer, which ends by itself")
  func manyAtOnce() async throws {
    let file = try String(contentsOfFile: demoModel + "/evaluation.jsonl", encoding: .utf8)
    var questions: [String: JSONValue] = [:]
    var lines: [String] = []
    for skill in ["extraction", "list_copy", "story"] {
      let those = try file.split(separator: "\n").map { try JSONValue.parse(String($0)) }
        .filter { $0["skill"]?.stringValue == skill }
      for (index, question) in those.prefix(8).enumerated() {
        let name = "\(skill)-\(index)"
        questions[name] = question
        let line: JSONValue = [
          "custom_id": .string(name), "method": "POST", "url": "/v1/chat/completions",
          "body": ["messages": question["messages"]!, "temperature": 0, "max_tokens": 100],
        ]
        lines.append(line.compactText)
      }
    }
    let asked = (questions, lines)
    try await withDemo { client in
      let end = try await client.end(of: try await client.batch(asked.1, endpoint: "/v1/chat/completions"))
      #expect(end["request_counts"] == ["total": 24, "completed": 24, "failed": 0], "\(end)")
      let output = try await client.lines(of: end["output_file_id"])
      #expect(Set(output.compactMap { $0["custom_id"]?.stringValue }) == Set(asked.0.keys))
      var (right, ended) = (0, 0)
      for line in output {
        let choice = line["response"]?["body"]?["choices"]?[0]
        let text = choice?["message"]?["content"]?.stringValue ?? ""
        let question = asked.0[line["custom_id"]?.stringValue ?? ""]
        let answer = question?["answer"]?.stringValue ?? "?"
        let isJSON = question?["match"] == "json"
        if isJSON ? (try? JSONValue.parse(text)) == (try? JSONValue.parse(answer)) : text == answer { right += 1 }
        if choice?["finish_reason"] == "stop" { ended += 1 }
      }
      #expect(right >= 20 && ended >= 23, "\(right) of 24 are right, \(ended) ended by themselves.")

      // Each of a list's prompts is about another donkey; a bystander changes nothing.
      async let bystander = client.post("/generate", ["text": "Once", "sampling_params": ["max_new_tokens": 60]])
      let texts = JSONValue.array(colours.map { .string(prompt(donkey($0))) })
      let body: JSONValue = ["text": texts, "sampling_params": ["temperature": 0, "max_new_tokens": 30]]
      let answers = try await client.post("/generate", body).json.arrayValue ?? []
      #expect(answers.map { $0["text"]?.stringValue } == colours.map { "The donkey is \($0)." })
      let end1 = answers.first?["meta_info"]?["finish_reason"]
      #expect(
        end1?["type"] == "stop"
          && end1?["matched"]?.intValue == answers.first?["output_ids"]?.arrayValue?.last?.intValue)
      #expect(try await bystander.status == 200)
      let ids = answers.compactMap { $0["output_ids"] }
      for (index, colour) in colours.enumerated() {
        let alone = try await client.post("/generate", with(body, ["text": .string(prompt(donkey(colour)))]))
        #expect(alone.json["output_ids"] == ids[index])
        // A word of the answer that is a stop text ends it before.
        var parameters = body["sampling_params"]!.objectValue!
        parameters["stop"] = [.string(" \(colour)")]
        let stopped = try await client.post(
          "/generate", ["text": .string(prompt(donkey(colour))), "sampling_params": .object(parameters)])
        #expect(stopped.json["text"] == "The donkey is")
        #expect(stopped.json["meta_info"]?["finish_reason"]?["matched"]?.stringValue == " \(colour)")
      }
    }
  }

  @Test("A right answer is more likely than a wrong one, wherever likelihoods are reported")
  func likelihoods() async throws {
    try await withDemo { client in
      /// The log-probability of an answer, as that of a prompt.
      @Sendable func likelihood(_ colour: String, of answer: String) async throws -> Double {
        let (question, answer) = (prompt(donkey(colour)), "The donkey is \(answer).<|im_end|>")
        let got = try await client.post(
          "/v1/completions",
          ["prompt": .string(question + answer), "echo": true, "logprobs": 0, "max_tokens": 0])
        let logprobs = try #require(got.json["choices"]?[0]?["logprobs"])
        let offsets = logprobs["text_offset"]!.arrayValue!.map { $0.intValue! }
        return zip(offsets, logprobs["token_logprobs"]!.arrayValue!).filter { $0.0 >= question.count }
          .reduce(0) { $0 + $1.1.doubleValue! }
      }
      for colour in colours {
        let right = try await likelihood(colour, of: colour)
        for other in colours where other != colour {
          #expect(try await likelihood(colour, of: other) < right - 1, "\(colour), \(other)")
        }
        // What the model draws has the likelihood that it has as a prompt.
        let drawn = try await client.post(
          "/v1/completions", ["prompt": .string(prompt(donkey(colour))), "temperature": 0, "logprobs": 0])
        #expect(drawn.json["choices"]?[0]?["text"]?.stringValue == "The donkey is \(colour).")
        let sum = drawn.json["choices"]?[0]?["logprobs"]?["token_logprobs"]?.arrayValue?
          .reduce(0) { $0 + ($1.doubleValue ?? 0) }
        #expect(sum == right)
      }
      // Labels: the colour of the item's story has the greatest share.
      var labels: [JSONValue] = []
      for colour in colours {
        let tokens = try await client.post("/tokenize", ["prompt": .string(" \(colour)"), "add_special_tokens": false])
        labels.append(try #require(tokens.json["tokens"]?[0]))
      }
      let items = JSONValue.array(
        colours.map { .string("\(donkey($0))<|im_end|>\n<|im_start|>assistant\nThe donkey is") })
      let scored = try await client.post(
        "/v1/score",
        [
          "query": "<|im_start|>user\n", "items": items, "label_token_ids": .array(labels), "apply_softmax": true,
        ])
      let rows = scored.json["scores"]?.arrayValue ?? []
      #expect(rows.count == colours.count, "\(scored.text)")
      for (index, row) in rows.enumerated() { #expect(row[index]?.doubleValue ?? 0 > 0.7, "\(colours[index]): \(row)") }
      // Of many drawn from a flat distribution the best is right, though not all are.
      let several: JSONValue = [
        "prompt": .string(prompt(donkey("blue"))), "temperature": 1.6, "seed": 5, "best_of": 8, "max_tokens": 20,
      ]
      let all = try await client.post("/v1/completions", with(several, ["n": 8]))
      let texts = all.json["choices"]?.arrayValue?.compactMap { $0["text"]?.stringValue } ?? []
      #expect(texts.count == 8 && Set(texts).count > 1, "\(texts)")
      let best = try await client.post("/v1/completions", several)
      #expect(best.json["choices"]?[0]?["text"] == "The donkey is blue.", "\(best.text)")
    }
  }
}
