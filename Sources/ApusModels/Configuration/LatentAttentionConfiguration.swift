import ApusCore
import Glibc

/// The sizes of multi-head latent attention (DeepSeek-V2, https://arxiv.org/abs/2405.04434).
///
/// What a layer remembers of a token is one latent of `latentRank` numbers, from which the keys and values of all heads can
/// be computed, and one rotated key of `rotaryDimension` numbers that all heads share.
public struct LatentAttentionConfiguration: Sendable, Equatable {
  /// `q_lora_rank`: numbers between the two matrices that make queries; `nil` where a single matrix does.
  public var queryRank: Int?
  /// `kv_lora_rank`: numbers of a latent.
  public var latentRank: Int
  /// `qk_nope_head_dim`: numbers of a head's query and key that are not rotated.
  public var plainDimension: Int
  /// `qk_rope_head_dim`: those that are.
  public var rotaryDimension: Int
  /// `v_head_dim`: numbers of a head's value.
  public var valueDimension: Int
  /// Whether neighbours are rotated together, as DeepSeek's weights want it, and not the halves of a head.
  public var isInterleaved: Bool
  /// Multiplies scores.
  public var scale: Float

  /// Numbers of a head's query and key.
  public var headDimension: Int { plainDimension + rotaryDimension }
  /// Numbers that a layer remembers of a token.
  public var cacheDimension: Int { latentRank + rotaryDimension }
}

extension LatentAttentionConfiguration {
  /// Reads the sizes. Defaults are those of transformers' `DeepseekV3Config`, which agree with DeepSeek-V2's.
  /// - Throws: `invalidCheckpoint` or `unsupported`, with file and field.
  init(_ fields: ConfigurationFields) throws(EngineError) {
    // Present and null means none (V2-Lite); absent means the families' default.
    queryRank =
      fields.json["q_lora_rank"] == nil ? 1536 : try fields.optionalSize("q_lora_rank", limit: 1 << 20)
    latentRank = try fields.optionalSize("kv_lora_rank", limit: 1 << 15) ?? 512
    plainDimension = try fields.optionalSize("qk_nope_head_dim", limit: 1 << 14) ?? 128
    rotaryDimension = try fields.optionalSize("qk_rope_head_dim", limit: 1 << 14) ?? 64
    valueDimension = try fields.optionalSize("v_head_dim", limit: 1 << 14) ?? 128
    isInterleaved = try fields.flag("rope_interleave") ?? true
    scale = 1
    scale = Float(pow(Double(headDimension), -0.5) * pow(try Self.mscale(fields), 2))
  }

  /// YaRN's factor for keys and queries: their product has it squared. 1 without `mscale_all_dim`.
  private static func mscale(_ fields: ConfigurationFields) throws(EngineError) -> Double {
    let key = fields.value("rope_scaling") != nil ? "rope_scaling" : "rope_parameters"
    guard let object = fields.value(key), object.objectValue != nil else { return 1 }
    let scaling = try ConfigurationFields(object, path: "\(fields.path): \(key)")
    let olderType = try scaling.text("type")
    let type = try scaling.text("rope_type") ?? olderType ?? "default"
    guard type != "default", let weight = try scaling.number("mscale_all_dim"), weight != 0,
      let factor = try scaling.number("factor"), factor > 1
    else { return 1 }
    return 0.1 * weight * log(factor) + 1
  }
}

/// What a layer remembers of a token.
public enum KVLayout: Sendable, Equatable {
  /// A key and a value for each of some heads.
  case heads(Int, dimension: Int)
  /// One key for all heads, whose first `valueDimension` numbers are the value too.
  case latent(keyDimension: Int, valueDimension: Int)

  /// Numbers of a token.
  public var numbers: Int {
    switch self {
    case .heads(let count, let dimension): 2 * count * dimension
    case .latent(let keyDimension, _): keyDimension
    }
  }
}
