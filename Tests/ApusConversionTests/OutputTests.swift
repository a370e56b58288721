import ApusConversion
import ApusCore
import ApusModels
import ApusTensors
import Foundation
import Testing

/// What is refused, and what is left behind.
struct OutputTests {
  private func refusal(_ body: () throws -> Void) -> EngineError? {
    do {
      try body()
      return nil
    } catch { return error as? EngineError }
  }

  @Test func existingOutputsStay() throws {
    let folder = try Folder()
    let model = try SmallModel().write(folder)
    let file = try folder.write("x.gguf", "mine")
    let error = refusal { try convert(model, file, "gguf-f32") }
    #expect(error?.message.contains("--force") == true && error?.code == .invalidRequest)
    #expect(try String(contentsOfFile: file, encoding: .utf8) == "mine")
    try convert(model, file, "gguf-f32") { $0.overwrites = true }
    #expect(try GGUFModelFiles(paths: [file]).tensors.count > 10)

    // A directory is replaced only if it is a checkpoint's.
    let other = folder.path + "/other"
    try FileManager.default.createDirectory(atPath: other, withIntermediateDirectories: true)
    try convert(model, other, "fp32")
    try folder.write("other/stale.json", "{}")
    #expect(refusal { try convert(model, other, "bf16") } != nil)
    try convert(model, other, "bf16") { $0.overwrites = true }
    #expect(!folder.names("other").contains("stale.json"))
    try FileManager.default.createDirectory(atPath: other + "/photos", withIntermediateDirectories: true)
    let precious = refusal { try convert(model, other, "bf16") { $0.overwrites = true } }
    #expect(precious?.message.contains("more than a checkpoint's files") == true)
    #expect(folder.names("other").contains("photos"))
    #expect(folder.names() == ["model", "other", "x.gguf"])

    for target in [model, model + "/inside", model + "/./"] {
      let error = refusal { try convert(model, target, "fp32") { $0.overwrites = true } }
      #expect(error?.message.contains("must not be the input") == true, "\(target)")
    }
  }

  @Test func failuresLeaveNothing() throws {
    let folder = try Folder()
    let model = try SmallModel().write(folder)
    let space = refusal { try convert(model, folder.path + "/out", "fp32") { $0.freeBytes = 1000 } }
    #expect(space?.message.contains("only 1000 are free") == true)
    // Stopped half-way.
    var options = ConversionOptions(input: model, output: folder.path + "/out", format: .dense(.bfloat16))
    for limit in [0, 5000] {
      let stopped = refusal { _ = try Converter.convert(options) { done, _, _ in done < limit } }
      #expect(stopped?.code == .aborted)
      #expect(folder.names() == ["model"])
    }
    options.format = .gguf(.q8_0)
    #expect(refusal { _ = try Converter.convert(options) { done, _, _ in done < 5000 } }?.code == .aborted)
    // Numbers that the format cannot hold.
    var tensors = try SmallModel().weights()
    let large: [Float] = [1e6] + [Float](repeating: 0.1, count: 63)
    tensors[1] = FileTensor("model.norm.weight", [64], large)
    try folder.write("model/model.safetensors", safetensors(tensors))
    let overflow = refusal { try convert(model, folder.path + "/out", "fp16") }
    #expect(overflow?.message.contains("model.norm.weight") == true && overflow?.message.contains("bf16") == true)
    let index = tensors.firstIndex { $0.name.contains("q_proj") }!
    tensors[index].bytes.replaceSubrange(0..<4, with: [0, 0, 0xC0, 0x7F])
    try folder.write("model/model.safetensors", safetensors(tensors))
    for format in ["int8", "int4", "gguf-q4_0", "gguf-q6_k"] {
      let nan = refusal { try convert(model, folder.path + "/out", format) { $0.groupSize = 32 } }
      #expect(nan?.message.contains("q_proj") == true, "\(format)")
    }
    #expect(folder.names() == ["model"])
    #expect(refusal { try convert(model, folder.path + "/absent/out", "fp32") }?.message.contains("absent") == true)
  }

  @Test func impossibleOptions() throws {
    let folder = try Folder()
    let model = try SmallModel().write(folder)
    let cases: [(String, String, (inout ConversionOptions) -> Void)] = [
      ("int4", "group size", { $0.groupSize = 12 }), ("int4", "128", { _ in }),
      ("int8", "layout", { $0.layout = .awq }), ("bf16", "asymmetric", { $0.isSymmetric = false }),
      ("int4", "down_proj", { ($0.groupSize, $0.layout) = (64, .gptq) }),
      ("fp32", "embeddings", { $0.quantizesEmbeddings = true }), ("fp32", "shard", { $0.maxShardBytes = 3 }),
      ("fp32", "must exist", { $0.input += "/absent" }),
    ]
    for (format, says, configure) in cases {
      let error = refusal { try convert(model, folder.path + "/out", format, configure) }
      #expect(error?.message.contains(says) == true, "\(says): \(error?.message ?? "accepted")")
    }
    #expect(ConversionFormat(name: "gguf-q3_k") == nil && ConversionFormat(name: "GGUF-Q4_K") == .gguf(.q4_K))
    #expect(ConversionFormat.named.allSatisfy { $0.format.name == $0.name })
  }

  @Test func whatGGUFCannotHold() throws {
    let cases: [(String, [(String, JSONValue)])] = [
      ("dynamic", [("rope_scaling", ["rope_type": "dynamic", "factor": 2.0])]),
      ("rotates whole heads", [("partial_rotary_factor", 0.5)]),
      (
        "sliding window over some",
        [
          ("architectures", ["Qwen2ForCausalLM"]), ("model_type", "qwen2"), ("use_sliding_window", true),
          ("sliding_window", 16), ("max_window_layers", 1),
        ]
      ),
    ]
    for (says, changes) in cases {
      let folder = try Folder()
      let model = try SmallModel(changes).write(folder)
      let error = refusal { try convert(model, folder.path + "/x.gguf", "gguf-f16") }
      #expect(error?.message.contains(says) == true, "\(says): \(error?.message ?? "accepted")")
    }
    let folder = try Folder()
    let model = try SmallModel().write(folder)
    var tensors = try SmallModel().weights()
    tensors.append(FileTensor("model.layers.0.mlp.extra.weight", [64], [Float](repeating: 1, count: 64)))
    try folder.write("model/model.safetensors", safetensors(tensors))
    #expect(refusal { try convert(model, folder.path + "/x.gguf", "gguf-f16") }?.message.contains("mlp.extra") == true)
    tensors.removeLast(2)
    try folder.write("model/model.safetensors", safetensors(tensors))
    #expect(refusal { try convert(model, folder.path + "/x.gguf", "gguf-f16") }?.message.contains("missing") == true)
    // Biases of zeros, which some quantisers write for layers without any, are no weights.
    tensors = try SmallModel().weights()
    tensors.append(FileTensor("model.layers.0.mlp.up_proj.bias", [96], [Float](repeating: 0, count: 96)))
    try folder.write("model/model.safetensors", safetensors(tensors))
    try convert(model, folder.path + "/x.gguf", "gguf-f16")
    tensors[tensors.count - 1] = FileTensor("model.layers.0.mlp.up_proj.bias", [96], [Float](repeating: 1, count: 96))
    try folder.write("model/model.safetensors", safetensors(tensors))
    #expect(
      refusal { try convert(model, folder.path + "/y.gguf", "gguf-f16") }?.message.contains("up_proj.bias") == true)
  }

  @Test func reports() throws {
    let folder = try Folder()
    let model = try SmallModel().write(folder)
    let report = try convert(model, folder.path + "/x.gguf", "gguf-q4_0")
    let json = try JSONValue.parse(report.json)
    #expect(json["format"]?.stringValue == "gguf-q4_0" && json["tensors"]?.arrayValue?.count == report.tensors.count)
    let first = try #require(json["tensors"]?.arrayValue?.first { $0["name"]?.stringValue?.contains("q_proj") == true })
    #expect(first["written_as"]?.stringValue == "Q4_0" && first["stored_as"]?.stringValue == "F32")
    #expect(first["relative_rms_error"]!.doubleValue! > 0.01 && first["max_abs_error"]!.doubleValue! > 0)
    let worst = report.worst(3)
    #expect(worst.count == 3 && worst[0].relativeError >= worst[2].relativeError)
    let attributes = try FileManager.default.attributesOfItem(atPath: folder.path + "/x.gguf")
    #expect(attributes[.size] as? Int == report.byteCount)
  }
}

/// Side files that describe the quantisation, and what is refused.
struct SideFileTests {
  @Test func filesBesideTheConfiguration() throws {
    let folder = try Folder()
    let original = try SmallModel().write(folder)
    for (name, method, layout) in [
      ("quantize_config.json", "gptq", IntegerLayout.gptq), ("quant_config.json", "awq", .awq),
    ] {
      let output = "\(folder.path)/\(method)"
      try convert(original, output, "int4") { ($0.groupSize, $0.layout) = (32, layout) }
      let wanted = try logits(output)
      // The description moves from config.json to the side file, without the method's name, as older tools wrote it.
      var config = try Paths.json(output + "/config.json").objectValue!
      var description = config["quantization_config"]!.objectValue!
      config["quantization_config"] = nil
      description["quant_method"] = nil
      if method == "awq" {
        description["w_bit"] = description["bits"]
        description["q_group_size"] = description["group_size"]
        description["version"] = "GEMM"
        for key in ["bits", "group_size"] { description[key] = nil }
      }
      try folder.write("\(method)/config.json", JSONValue.object(config).compactText)
      #expect(throws: EngineError.self) { try logits(output) }
      try folder.write("\(method)/\(name)", JSONValue.object(description).compactText)
      #expect(try logits(output) == wanted, "\(name)")
      // Such a file is not carried over to what is no longer quantised.
      try convert(output, "\(output)-dense", "fp32")
      #expect(!folder.names("\(method)-dense").contains(name))
      for (content, says) in [
        ("{", name), ("[]", "expected an object"), (#"{"bits":3,"w_bit":3,"group_size":32}"#, "3 bits"),
      ] {
        try folder.write("\(method)/\(name)", content)
        let error = #expect(throws: EngineError.self) { try logits(output) }
        #expect(
          error?.message.contains(says) == true && error?.message.contains(name) == true, "\(error?.message ?? "")")
      }
    }
  }

  @Test func modelOpt() throws {
    let folder = try Folder()
    let model = try SmallModel().write(folder)
    func quantization(_ text: String) throws -> QuantizationConfiguration? {
      try folder.write("model/hf_quant_config.json", text)
      return try ModelConfiguration(directory: model).quantization
    }
    let fp8 = try quantization(
      #"{"producer":{"name":"modelopt"},"quantization":{"quant_algo":"FP8","kv_cache_quant_algo":"FP8","exclude_modules":["lm_head"]}}"#
    )
    #expect(fp8?.method == "fp8" && fp8?.ignored == ["lm_head"])
    #expect(fp8?.scheme(for: "model.layers.0.mlp.up_proj") == .float8(scales: .tensorOrChannel))
    #expect(try quantization(#"{"quantization":{"quant_algo":null,"kv_cache_quant_algo":"FP8"}}"#) == nil)
    for (text, says) in [
      (#"{"quantization":{"quant_algo":"NVFP4"}}"#, "NVFP4"), ("{}", "must be an object"),
      ("x", "hf_quant_config.json"),
    ] {
      let error = #expect(throws: EngineError.self) { try quantization(text) }
      #expect(error?.message.contains(says) == true, "\(error?.message ?? "")")
    }
  }

  @Test func methodsThatAreNotRead() throws {
    for (method, says) in [
      ("bitsandbytes", "bitsandbytes"), ("mystery", "the method mystery"), ("exl2", "EXL2"), ("hqq", "HQQ"),
    ] {
      let folder = try Folder()
      let model = try SmallModel([
        ("quantization_config", ["quant_method": .string(method), "load_in_4bit": true, "bnb_4bit_quant_type": "nf4"])
      ]).write(folder)
      for attempt in [{ _ = try logits(model) }, { try convert(model, folder.path + "/out", "bf16") }] {
        let error = #expect(throws: EngineError.self) { try attempt() }
        #expect(error?.code == .unsupported && error?.message.contains("quantised with \(says)") == true)
      }
      let inspection = CheckpointInspection(path: model)
      #expect(inspection.refusals.count == 1 && inspection.refusals[0].contains(says), "\(inspection.refusals)")
    }
  }
}
