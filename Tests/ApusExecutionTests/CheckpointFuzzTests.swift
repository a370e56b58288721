import ApusCore
import ApusExecution
import ApusModels
import ApusTesting
import ApusTensors
import Foundation
import Testing

/// Parsers of checkpoints over damaged input: a value or an error that says why, in bounded time and memory.
/// `Scripts/fuzz.sh` runs each for ten minutes.
@Suite("Fuzz: parsers of checkpoints")
struct CheckpointFuzzTests {
  private func attempt(_ body: () throws -> Void) {
    do {
      try body()
    } catch let error as EngineError {
      #expect(error.code != .internalFailure && !error.message.isEmpty, "\(error)")
    } catch {
      Issue.record("\(error)")
    }
  }

  @Test func safetensorsHeaders() throws {
    let folder = try TemporaryDirectory()
    let whole = safetensors([
      FileTensor("model.embed_tokens.weight", [4, 8], (0..<32).map { Float($0) }),
      FileTensor("model.norm.weight", type: "BF16", [8], [UInt8](repeating: 1, count: 16)),
      FileTensor("empty", type: "I64", [0, 3], []),
    ])
    let words = [
      #""dtype":"F32""#, #""shape":[1,1099511627776]"#, #""data_offsets":[0,0]"#, "{", "}", "null",
      #""__metadata__":{},"#, "-1,",
    ]
    let path = folder.path + "/damaged.safetensors"
    let report = try fuzz("safetensors header") { generator in
      let damaged = generator.mutated(whole, words: words)
      try folder.write("damaged.safetensors", damaged)
      attempt {
        let file = try SafetensorsFile(path: path)
        // What the header promises lies in the file.
        for entry in file.entries.values { #expect(file.bytes(of: entry).count <= damaged.count) }
      }
    }
    #expect(report.isBounded, "\(report)")
  }

  @Test func configurations() throws {
    let configurations = [
      #"{"architectures":["LlamaForCausalLM"],"hidden_size":8,"intermediate_size":12,"num_hidden_layers":1,"num_attention_heads":2,"num_key_value_heads":1,"vocab_size":10,"max_position_embeddings":32,"rms_norm_eps":1e-5,"rope_theta":10000.0,"rope_scaling":{"rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,"original_max_position_embeddings":16},"tie_word_embeddings":true,"eos_token_id":[3,4],"torch_dtype":"bfloat16"}"#,
      #"{"architectures":["Qwen3ForCausalLM"],"hidden_size":64,"intermediate_size":96,"num_hidden_layers":2,"num_attention_heads":4,"num_key_value_heads":2,"head_dim":32,"vocab_size":100,"max_position_embeddings":4096,"rope_scaling":{"type":"yarn","factor":4.0,"original_max_position_embeddings":1024},"sliding_window":128,"use_sliding_window":false,"quantization_config":{"quant_method":"gptq","bits":4,"group_size":32,"sym":true,"desc_act":false}}"#,
    ].map { Array($0.utf8) }
    let words = [
      "null", "-1", "1e400", "[]", "{}", "\"x\"", "true", "99999999999999", "0", ",\"num_hidden_layers\":1000000000",
    ]
    let report = fuzz("config.json") { generator in
      let damaged = generator.mutated(generator.pick(configurations), words: words)
      guard let json = try? JSONValue.parse(damaged) else { return }
      attempt { _ = try ModelConfiguration(json: json, path: "config.json") }
    }
    #expect(report.isBounded, "\(report)")
  }
}
