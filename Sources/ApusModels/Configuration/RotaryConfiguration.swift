import ApusCore
import Glibc

/// How positions rotate the heads of q and k: rotary position embeddings and their scalings.
///
/// Formulas are those of Hugging Face transformers (`modeling_rope_utils.py`) and of the papers named below. Two of them
/// depend on the length of the sequence there; that would make a token's K/V depend on how its prompt was chunked and
/// cached. Here they depend on the served context length instead, which is constant for the life of a server:
///
/// - `dynamic` uses the base for the longest sequence that is served. Up to `max_position_embeddings` that is the
///   unscaled base, exactly as in transformers.
/// - `longrope` uses the short factors if the served context length is at most the original one, and the long factors
///   for every token otherwise.
public struct RotaryConfiguration: Sendable, Equatable {
  /// The scaling of the frequencies.
  public enum Scaling: Sendable, Equatable {
    case none
    /// Positions are divided by the factor.
    case linear(factor: Double)
    /// NTK-aware scaling of the base with the length.
    case dynamic(factor: Double)
    /// Llama 3.1: low frequencies are divided, high ones kept, those between interpolated.
    case llama3(factor: Double, lowFrequencyFactor: Double, highFrequencyFactor: Double, originalLength: Int)
    /// YaRN, https://arxiv.org/abs/2309.00071. `attentionFactor` multiplies cosines and sines.
    case yarn(
      factor: Double, attentionFactor: Double, betaFast: Double, betaSlow: Double, originalLength: Int, truncate: Bool)
    /// LongRoPE, https://arxiv.org/abs/2402.13753: one factor per frequency.
    case longRoPE(shortFactors: [Double], longFactors: [Double], attentionFactor: Double, originalLength: Int)
  }

  /// Base of the frequencies.
  public var theta: Double
  /// Numbers at the start of each head that are rotated; even.
  public var rotaryDimension: Int
  public var scaling: Scaling

  /// Describes unscaled rotation.
  public init(theta: Double = 10_000, rotaryDimension: Int, scaling: Scaling = .none) {
    self.theta = theta
    self.rotaryDimension = rotaryDimension
    self.scaling = scaling
  }

  func defaultContextLength(_ maxPositionEmbeddings: Int) -> Int {
    if case .yarn(let factor, _, _, _, let originalLength, _) = scaling {
      return max(maxPositionEmbeddings, Int(Double(originalLength) * factor))
    }
    return maxPositionEmbeddings
  }

  func maximumContextLength(_ maxPositionEmbeddings: Int) -> Int {
    switch scaling {
    case .linear(let factor), .dynamic(let factor): Int(Double(maxPositionEmbeddings) * max(factor, 1))
    default: defaultContextLength(maxPositionEmbeddings)
    }
  }
}

extension RotaryConfiguration {
  /// - Parameter rotatedShare: the share of a head that is rotated where the file is silent.
  init(
    _ fields: ConfigurationFields, headDimension: Int, maxPositionEmbeddings: Int, rotatedShare: Double = 1
  ) throws(EngineError) {
    // transformers 5 writes one object `rope_parameters`; before, `rope_scaling` stood beside `rope_theta`.
    let key = fields.value("rope_scaling") != nil ? "rope_scaling" : "rope_parameters"
    let object = fields.value(key) ?? .object(JSONObject())
    guard object.objectValue != nil else {
      throw fields.invalid("\(key) must be an object, found \(object.kindName)")
    }
    let scaling = try ConfigurationFields(object, path: "\(fields.path): \(key)")
    if object.objectValue!.contains(where: { $0.value.objectValue != nil }) {
      throw scaling.unsupported("different rotations for different kinds of layers are not implemented")
    }
    if scaling.value("mrope_section") != nil {
      throw scaling.unsupported("positions of several axes (mrope) are not implemented")
    }

    let outerTheta = try fields.number("rope_theta")
    let outerPartial = try fields.number("partial_rotary_factor")
    theta = try scaling.number("rope_theta") ?? outerTheta ?? 10_000
    let partial = try scaling.number("partial_rotary_factor") ?? outerPartial ?? rotatedShare
    guard theta > 1, partial > 0, partial <= 1 else {
      throw fields.invalid(
        "rope_theta must be above 1 and partial_rotary_factor in (0, 1], found \(theta) and \(partial)")
    }
    rotaryDimension = Int(Double(headDimension) * partial)
    guard rotaryDimension >= 2, rotaryDimension % 2 == 0 else {
      throw fields.unsupported("an odd number of rotated numbers per head (\(rotaryDimension)) is not implemented")
    }
    self.scaling = try Self.scaling(
      scaling, fields, rotaryDimension: rotaryDimension, maxPositionEmbeddings: maxPositionEmbeddings)
  }

  private static func scaling(
    _ scaling: ConfigurationFields, _ fields: ConfigurationFields, rotaryDimension: Int, maxPositionEmbeddings: Int
  ) throws(EngineError) -> Scaling {
    func factor() throws(EngineError) -> Double {
      guard let factor = try scaling.number("factor"), factor >= 1 else {
        throw scaling.invalid("factor must be a number of at least 1")
      }
      return factor
    }
    // A value beside the rope fields goes before one within them (Phi-3 and its kin).
    let innerLength = try scaling.optionalSize("original_max_position_embeddings", limit: 1 << 28)
    let outerLength = try fields.optionalSize("original_max_position_embeddings", limit: 1 << 28)
    let originalLength = outerLength ?? innerLength ?? maxPositionEmbeddings
    let impliedFactor = Double(maxPositionEmbeddings) / Double(originalLength)

    let olderType = try scaling.text("type")
    let type = try scaling.text("rope_type") ?? olderType ?? "default"
    switch type {
    case "default":
      return .none
    case "linear":
      return .linear(factor: try factor())
    case "dynamic":
      guard rotaryDimension > 2 else { throw scaling.unsupported("dynamic scaling needs heads of more than 2 numbers") }
      return .dynamic(factor: try factor())
    case "llama3":
      guard let low = try scaling.number("low_freq_factor"), let high = try scaling.number("high_freq_factor"),
        low > 0, high > low
      else { throw scaling.invalid("low_freq_factor and high_freq_factor must be numbers, the second the larger") }
      return .llama3(
        factor: try factor(), lowFrequencyFactor: low, highFrequencyFactor: high, originalLength: originalLength)
    case "yarn":
      let factor = scaling.value("factor") == nil ? impliedFactor : try factor()
      func mscale(_ weight: Double) -> Double { factor <= 1 ? 1 : 0.1 * weight * log(factor) + 1 }
      let attentionFactor: Double
      if let given = try scaling.number("attention_factor") {
        attentionFactor = given
      } else if let weight = try scaling.number("mscale"), let allWeight = try scaling.number("mscale_all_dim"),
        weight != 0, allWeight != 0
      {
        attentionFactor = mscale(weight) / mscale(allWeight)
      } else {
        attentionFactor = mscale(1)
      }
      func beta(_ key: String, _ standard: Double) throws(EngineError) -> Double {
        let value = try scaling.number(key) ?? standard
        return value == 0 ? standard : value
      }
      return .yarn(
        factor: factor, attentionFactor: attentionFactor, betaFast: try beta("beta_fast", 32),
        betaSlow: try beta("beta_slow", 1), originalLength: originalLength,
        truncate: try scaling.flag("truncate") ?? true)
    case "longrope", "su":
      guard let short = try scaling.numbers("short_factor"), let long = try scaling.numbers("long_factor"),
        short.count == rotaryDimension / 2, long.count == rotaryDimension / 2,
        short.allSatisfy({ $0 > 0 }), long.allSatisfy({ $0 > 0 })
      else {
        throw scaling.invalid(
          "short_factor and long_factor must each hold \(rotaryDimension / 2) positive numbers, one per frequency")
      }
      let factor = scaling.value("factor") == nil ? impliedFactor : try factor()
      let attentionFactor =
        try scaling.number("attention_factor")
        ?? (factor <= 1 ? 1 : (1 + log(factor) / log(Double(originalLength))).squareRoot())
      return .longRoPE(
        shortFactors: short, longFactors: long, attentionFactor: attentionFactor, originalLength: originalLength)
    default:
      throw scaling.unsupported("the rotation \(type) is not one of default, linear, dynamic, llama3, yarn, longrope")
    }
  }
}

extension RotaryConfiguration {
  /// The angles per position of each pair of numbers, [rotaryDimension / 2], and the factor of cosines and sines.
  /// - Parameters:
  ///   - contextLength: the longest sequence served.
  ///   - maxPositionEmbeddings: the model's own longest sequence.
  public func frequencies(contextLength: Int, maxPositionEmbeddings: Int) -> (inverse: [Float], factor: Float) {
    let half = rotaryDimension / 2
    func exponent(_ index: Int) -> Double { Double(2 * index) / Double(rotaryDimension) }
    func unscaled(_ base: Double) -> [Double] { (0..<half).map { 1 / pow(base, exponent($0)) } }

    switch scaling {
    case .none:
      return (unscaled(theta).map(Float.init), 1)
    case .linear(let factor):
      return (unscaled(theta).map { Float($0 / factor) }, 1)
    case .dynamic(let factor):
      let length = Double(max(contextLength, maxPositionEmbeddings))
      let growth = factor * length / Double(maxPositionEmbeddings) - (factor - 1)
      let base = theta * pow(growth, Double(rotaryDimension) / Double(rotaryDimension - 2))
      return (unscaled(base).map(Float.init), 1)
    case .llama3(let factor, let low, let high, let originalLength):
      let inverse = unscaled(theta).map { frequency -> Float in
        // How often the pair turns within the original context.
        let turns = Double(originalLength) * frequency / (2 * .pi)
        if turns < low { return Float(frequency / factor) }
        if turns > high { return Float(frequency) }
        let smooth = (turns - low) / (high - low)
        return Float((1 - smooth) * frequency / factor + smooth * frequency)
      }
      return (inverse, 1)
    case .yarn(let factor, let attentionFactor, let betaFast, let betaSlow, let originalLength, let truncate):
      // The (fractional) pair that turns so many times within the original context.
      func pair(turns: Double) -> Double {
        Double(rotaryDimension) * log(Double(originalLength) / (turns * 2 * .pi)) / (2 * log(theta))
      }
      var low = pair(turns: betaFast)
      var high = pair(turns: betaSlow)
      if truncate { (low, high) = (low.rounded(.down), high.rounded(.up)) }
      low = max(low, 0)
      high = min(high, Double(rotaryDimension - 1))
      if low == high { high += 0.001 }
      let inverse = unscaled(theta).enumerated().map { index, frequency -> Float in
        let interpolated = min(max((Double(index) - low) / (high - low), 0), 1)
        return Float(frequency / factor * interpolated + frequency * (1 - interpolated))
      }
      return (inverse, Float(attentionFactor))
    case .longRoPE(let shortFactors, let longFactors, let attentionFactor, let originalLength):
      let factors = contextLength > originalLength ? longFactors : shortFactors
      let inverse = zip(unscaled(theta), factors).map { Float($0 / $1) }
      return (inverse, Float(attentionFactor))
    }
  }
}
