import ApusCore
import ApusTensors

extension ModelArchitecture {
  /// gpt-oss: each head may attend to a sink; every other layer has a window; experts with biases and a clamped SwiGLU, all of
  /// a layer's in one tensor, as MXFP4 or plain numbers.
  static let gptOSS = ModelArchitecture(
    name: "GptOssForCausalLM", modelType: "gpt_oss", headDimension: 64, maxPositionEmbeddings: 131_072,
    qkvBias: { fields throws(EngineError) in try fields.flag("attention_bias") ?? true },
    attentionOutputBias: { fields throws(EngineError) in try fields.flag("attention_bias") ?? true },
    mlpBias: { _ throws(EngineError) in false },
    queryKeyNorm: { _ throws(EngineError) in false },
    slidingWindows: { fields, layerCount throws(EngineError) in
      let window = try fields.optionalSize("sliding_window", limit: 1 << 30) ?? 128
      if fields.value("layer_types") != nil { return try windows(ofTypes: fields, layerCount, window: window) }
      return (0..<layerCount).map { $0 % 2 == 0 ? window : 0 }
    },
    experts: { fields, layerCount throws(EngineError) in
      var experts = try ExpertConfiguration(
        softmax: fields, layerCount: layerCount, width: "intermediate_size", defaults: (128, 4), normalizes: true)
      experts?.score = .softmaxOfChosen
      experts?.normalizes = true
      experts?.hasBiases = true
      experts?.storage = .inputsByOutputs
      experts?.names.router = "router"
      let (alpha, limit) = (try fields.number("swiglu_alpha") ?? 1.702, try fields.number("swiglu_limit") ?? 7)
      guard fields.value("rope_scaling") != nil || fields.value("rope_parameters") != nil else {
        throw fields.invalid("rope_scaling is missing, without which positions have no meaning")
      }
      guard limit > 0 else { throw fields.invalid("swiglu_limit must be a positive number") }
      experts?.activation = .clampedSwiGLU(alpha: Float(alpha), limit: Float(limit))
      return experts
    },
    hasSinks: true)
}
