package import ApusCore

/// A request of a benchmark before it is given words: its prompt as numbers of *units*, each of which the server counts as
/// one token, or as the user's own text.
package struct BenchRequest: Sendable, Equatable {
  /// What is sent.
  package enum Prompt: Sendable, Equatable {
    /// Units in 0..<unitCount; `PromptUnits` makes token ids or words of them.
    case units([Int])
    /// The user's text, taken as it is.
    case text(String)
    /// The user's conversation, taken as it is.
    case messages(JSONValue)
    /// The user's token ids, taken as they are.
    case tokens([TokenID])
  }

  /// What is sent.
  package var prompt: Prompt
  /// Tokens asked for.
  package var outputLength: Int
  /// Seconds after the start at which a trace sends it; `nil` leaves it to the request rate.
  package var arrival: Double?

  /// Makes a request.
  package init(prompt: Prompt, outputLength: Int, arrival: Double? = nil) {
    self.prompt = prompt
    self.outputLength = outputLength
    self.arrival = arrival
  }
}

/// Makes the requests of a benchmark. Equal arguments give equal requests, on every machine.
package enum BenchDataset {
  /// Prompts of random units and lengths.
  /// - Parameter rangeRatio: lengths are uniform in [ratio * length, length]; 1 makes all equal.
  package static func random(
    count: Int, inputLength: Int, outputLength: Int, rangeRatio: Double, unitCount: Int, seed: UInt64
  ) -> [BenchRequest] {
    var generator = SeededGenerator(seed: seed)
    return (0..<count).map { _ in
      let input = draw(inputLength, rangeRatio, &generator)
      let output = draw(outputLength, rangeRatio, &generator)
      return BenchRequest(prompt: .units(units(input, unitCount, &generator)), outputLength: output)
    }
  }

  /// Groups of prompts that begin with the same text, as users of one application do. The order is shuffled.
  /// - Parameters:
  ///   - prefixLength: units that a group shares.
  ///   - questionLength: units of each prompt's own.
  package static func sharedPrefix(
    groups: Int, promptsPerGroup: Int, prefixLength: Int, questionLength: Int, outputLength: Int, rangeRatio: Double,
    unitCount: Int, seed: UInt64
  ) -> [BenchRequest] {
    var generator = SeededGenerator(seed: seed)
    var requests: [BenchRequest] = []
    for _ in 0..<groups {
      let prefix = units(prefixLength, unitCount, &generator)
      for _ in 0..<promptsPerGroup {
        let question = units(draw(questionLength, rangeRatio, &generator), unitCount, &generator)
        let output = draw(outputLength, rangeRatio, &generator)
        requests.append(BenchRequest(prompt: .units(prefix + question), outputLength: output))
      }
    }
    requests.shuffle(using: &generator)
    return requests
  }

  /// A request of Mooncake's traces (FAST'25): arrival in milliseconds, lengths in tokens, and the hashes of the prompt's
  /// blocks of 512 tokens.
  package struct TraceLine: Sendable, Equatable {
    package var timestamp: Double
    package var inputLength: Int
    package var outputLength: Int
    package var hashes: [Int]

    /// Reads a line of a trace; `nil` if it is none.
    package init?(_ value: JSONValue) {
      guard let timestamp = value["timestamp"]?.doubleValue, let input = value["input_length"]?.intValue,
        let output = value["output_length"]?.intValue, let hashes = value["hash_ids"]?.arrayValue, input > 0
      else { return nil }
      self.timestamp = timestamp
      inputLength = input
      outputLength = max(1, output)
      self.hashes = hashes.compactMap(\.intValue)
    }
  }

  /// Prompts that share prefixes exactly where a trace's did: a block is a function of its hash alone, and since the trace
  /// numbers blocks by their whole prefix, equal hashes mean equal prompts up to there.
  /// - Parameters:
  ///   - blockSize: tokens of a block.
  ///   - scale: lengths and blocks are multiplied by this, so that long traces fit short contexts.
  ///   - speed: arrivals are divided by this.
  package static func trace(
    _ lines: [TraceLine], blockSize: Int, scale: Double, speed: Double, maxInputLength: Int?, unitCount: Int,
    seed: UInt64
  ) -> [BenchRequest] {
    let block = max(1, Int((Double(blockSize) * scale).rounded()))
    let start = lines.first?.timestamp ?? 0
    return lines.map { line in
      var length = max(1, Int((Double(line.inputLength) * scale).rounded()))
      if let maxInputLength { length = min(length, maxInputLength) }
      var prompt: [Int] = []
      prompt.reserveCapacity(length + block)
      for hash in line.hashes where prompt.count < length {
        var generator = SeededGenerator(seed: seed ^ (UInt64(bitPattern: Int64(hash)) &* 0x9E37_79B9_7F4A_7C15))
        prompt += units(block, unitCount, &generator)
      }
      if prompt.count < length {
        // The trace lists fewer blocks than the length needs: the rest is shared with nobody.
        var generator = SeededGenerator(seed: seed ^ UInt64(line.timestamp) ^ UInt64(prompt.count) << 32)
        prompt += units(length - prompt.count, unitCount, &generator)
      }
      prompt.removeLast(prompt.count - length)
      let output = max(1, Int((Double(line.outputLength) * scale).rounded()))
      return BenchRequest(
        prompt: .units(prompt), outputLength: output, arrival: (line.timestamp - start) / 1000 / speed)
    }
  }

  /// The first question of each conversation of a ShareGPT file (a JSON array, or one conversation a line) and the length
  /// of its answer.
  /// - Parameters:
  ///   - outputLength: asked for instead of the length of the file's answer.
  ///   - count: conversations drawn, without repetition as long as there are enough.
  /// - Throws: where the file holds no conversation.
  package static func shareGPT(
    _ bytes: [UInt8], count: Int, outputLength: Int?, seed: UInt64
  ) throws(EngineError) -> [BenchRequest] {
    var candidates: [BenchRequest] = []
    for conversation in try documents(bytes) {
      let turns = conversation["conversations"]?.arrayValue ?? conversation["conversation"]?.arrayValue ?? []
      guard let index = turns.firstIndex(where: { ["human", "user"].contains($0["from"]?.stringValue ?? "") }),
        let question = turns[index]["value"]?.stringValue, !question.isEmpty
      else { continue }
      let answer = turns.indices.contains(index + 1) ? turns[index + 1]["value"]?.stringValue ?? "" : ""
      guard outputLength != nil || !answer.isEmpty else { continue }
      candidates.append(
        BenchRequest(prompt: .text(question), outputLength: outputLength ?? max(4, estimatedTokens(answer))))
    }
    guard !candidates.isEmpty else {
      throw EngineError(
        .invalidRequest, "The file holds no ShareGPT conversation: 'conversations' with 'from' and 'value'.")
    }
    return drawn(candidates, count: count, seed: seed)
  }

  /// The user's own prompts: JSONL with "prompt", "messages" or "input_ids" and optionally "output_len" or "max_tokens".
  package static func custom(
    _ bytes: [UInt8], count: Int?, outputLength: Int, seed: UInt64
  ) throws(EngineError) -> [BenchRequest] {
    var requests: [BenchRequest] = []
    for (index, line) in try documents(bytes).enumerated() {
      let prompt: BenchRequest.Prompt
      if let text = line["prompt"]?.stringValue ?? line["text"]?.stringValue {
        prompt = .text(text)
      } else if let messages = line["messages"], messages.arrayValue != nil {
        prompt = .messages(messages)
      } else if let ids = line["input_ids"]?.arrayValue {
        prompt = .tokens(ids.compactMap { $0.intValue.flatMap { TokenID(exactly: $0) } })
      } else {
        throw EngineError(
          .invalidRequest, "Line \(index + 1) of the file has none of 'prompt', 'messages' and 'input_ids'.")
      }
      let output = line["output_len"]?.intValue ?? line["max_tokens"]?.intValue ?? outputLength
      requests.append(
        BenchRequest(prompt: prompt, outputLength: max(1, output), arrival: line["arrival"]?.doubleValue))
    }
    guard !requests.isEmpty else { throw EngineError(.invalidRequest, "The file holds no prompt.") }
    guard let count, count != requests.count else { return requests }
    return count < requests.count ? Array(requests[..<count]) : drawn(requests, count: count, seed: seed)
  }

  /// The arrival times of a Poisson process, in seconds from its first request. An infinite rate sends all at once.
  package static func poissonArrivals(count: Int, rate: Double, seed: UInt64) -> [Double] {
    guard rate.isFinite else { return Array(repeating: 0, count: count) }
    var generator = SeededGenerator(seed: seed ^ 0xA221_7A15)
    var time = 0.0
    return (0..<count).map { index in
      if index > 0 { time += generator.exponential(rate: rate) }
      return time
    }
  }

  /// Tokens that a text has, guessed from its bytes: four a token, as English has on average.
  package static func estimatedTokens(_ text: String) -> Int { (text.utf8.count + 3) / 4 }

  private static func draw(_ length: Int, _ ratio: Double, _ generator: inout SeededGenerator) -> Int {
    let low = max(1, Int(Double(length) * ratio))
    return low >= length ? max(1, length) : Int.random(in: low...length, using: &generator)
  }

  private static func units(_ count: Int, _ unitCount: Int, _ generator: inout SeededGenerator) -> [Int] {
    (0..<count).map { _ in Int(generator.next() % UInt64(unitCount)) }
  }

  private static func drawn(_ candidates: [BenchRequest], count: Int, seed: UInt64) -> [BenchRequest] {
    var generator = SeededGenerator(seed: seed)
    var requests: [BenchRequest] = []
    while requests.count < count {
      requests += candidates.shuffled(using: &generator).prefix(count - requests.count)
    }
    return requests
  }

  /// The elements of a JSON array, or the lines of a JSONL file.
  private static func documents(_ bytes: [UInt8]) throws(EngineError) -> [JSONValue] {
    if bytes.first(where: { ![0x20, 0x09, 0x0A, 0x0D].contains($0) }) == UInt8(ascii: "[") {
      do throws(JSONError) {
        return try JSONValue.parse(bytes).arrayValue ?? []
      } catch {
        throw EngineError(.invalidRequest, "The file is not JSON: \(error).")
      }
    }
    var values: [JSONValue] = []
    for (index, line) in bytes.split(separator: 0x0A).enumerated() {
      if line.allSatisfy({ $0 == 0x20 || $0 == 0x0D }) { continue }
      do throws(JSONError) {
        values.append(try JSONValue.parse(Array(line)))
      } catch {
        throw EngineError(.invalidRequest, "Line \(index + 1) of the file is not JSON: \(error).")
      }
    }
    return values
  }
}
