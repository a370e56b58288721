import ApusHub
import Testing

@Suite struct NameTests {
  @Test func references() throws {
    func parts(_ text: String) throws -> [String?] {
      let reference = try RepositoryReference(text)
      return [reference.repository, reference.revision, reference.quantization]
    }
    #expect(try parts("Qwen/Qwen3-0.6B") == ["Qwen/Qwen3-0.6B", "main", nil])
    #expect(try parts("a/b@v1.0") == ["a/b", "v1.0", nil])
    #expect(try parts("a/b@refs/pr/12:Q4_K_M") == ["a/b", "refs/pr/12", "Q4_K_M"])
    #expect(try parts("a/b:UD-Q4_K_XL@dev") == ["a/b", "dev", "UD-Q4_K_XL"])
    #expect(try parts("hf://a/b@dev") == ["a/b", "dev", nil])
    #expect(try parts("https://huggingface.co/a/b/tree/v2") == ["a/b", "v2", nil])
    #expect(try parts("https://huggingface.co/a/b/") == ["a/b", "main", nil])
    for text in [
      "", "a", "/a/b", "a/b/c", "./a", "../a", "a/..", "-a/b", "a/b.", "a/b--c", "a/b.git", "a/b@", "a/b:", "a/b@x@y",
      "a/b@../../x", "a/b@/x", "a/b@x//y", "a/b@x..y", "a/b@.x", "a/b:x/y", "a b/c", "a/b\n", "~/models", "models/x/",
      String(repeating: "a", count: 60) + "/" + String(repeating: "b", count: 60), "a/b@x y", "ä/b",
    ] {
      #expect(!RepositoryReference.isReference(text), "\(text)")
    }
  }

  @Test func addresses() throws {
    let base = try #require(HubURL("https://Hub.Example/prefix/api/x?a=b#c"))
    #expect(base.text == "https://hub.example/prefix/api/x?a=b")
    #expect(base.origin == "https://hub.example:443")
    #expect(base.resolving("/y")?.text == "https://hub.example/y")
    #expect(base.resolving("y?z=http://w")?.text == "https://hub.example/prefix/api/y?z=http://w")
    #expect(base.resolving("//cdn.example/y")?.text == "https://cdn.example/y")
    #expect(base.resolving("http://cdn.example:8080/y")?.origin == "http://cdn.example:8080")
    #expect(base.resolving("/ü")?.path == "/%C3%BC")
    #expect(HubURL("http://[::1]:80/x")?.text == "http://[::1]/x")
    for text in [
      "ftp://a/b", "file:///etc", "https://", "https://user@host/", "https://host:0/", "https://host:99999/", "//a/b",
      "x",
      "https://a b/", "https://a\n/", "https://a\\b/", "https://[::1",
      "https://" + String(repeating: "a", count: 20000),
    ] {
      #expect(HubURL(text) == nil, "\(text.prefix(40))")
    }
    // Another port or scheme is another origin: the token stays at home.
    let origins = ["http://h/", "https://h/", "http://h:8080/", "http://h.evil/"].compactMap { HubURL($0)?.origin }
    #expect(Set(origins).count == 4)
  }

  @Test func environments() throws {
    func configuration(_ variables: [String: String]) throws -> HubConfiguration {
      var variables = variables
      variables["HOME"] = variables["HOME"] ?? "/nowhere"
      return try HubConfiguration(environment: { variables[$0] })
    }
    #expect(try configuration([:]).cacheDirectory == "/nowhere/.cache/huggingface/hub")
    #expect(try configuration(["XDG_CACHE_HOME": "/x"]).cacheDirectory == "/x/huggingface/hub")
    #expect(try configuration(["XDG_CACHE_HOME": "/x", "HF_HOME": "~/hf"]).cacheDirectory == "/nowhere/hf/hub")
    #expect(try configuration(["HF_HOME": "/y", "HUGGINGFACE_HUB_CACHE": "/z"]).cacheDirectory == "/z")
    #expect(
      try configuration(["HF_HUB_CACHE": "$BASE/${SUB}/c/", "BASE": "/b", "SUB": "s"]).cacheDirectory == "/b/s/c")
    #expect(try configuration(["HF_HUB_CACHE": ""]).cacheDirectory == "/nowhere/.cache/huggingface/hub")
    #expect(try configuration([:]).endpoint == "https://huggingface.co")
    #expect(try configuration(["HF_ENDPOINT": "http://mirror:8080/hf//"]).endpoint == "http://mirror:8080/hf")
    #expect(throws: HubError.self) { try configuration(["HF_ENDPOINT": "mirror"]) }
    #expect(try configuration(["HF_TOKEN": " hf_abc\n"]).token == "hf_abc")
    #expect(try configuration(["HF_TOKEN": "bad\u{1}token"]).token == nil)
    #expect(try configuration(["HUGGING_FACE_HUB_TOKEN": "old"]).token == "old")
    #expect(try configuration(["HF_TOKEN": "x", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"]).token == nil)
    #expect(try configuration(["HF_HUB_OFFLINE": "yes"]).isOffline)
    #expect(try configuration(["TRANSFORMERS_OFFLINE": "1"]).isOffline)
    #expect(try !configuration(["HF_HUB_OFFLINE": "0"]).isOffline)
    #expect(try configuration(["HTTPS_PROXY": "http://p:3128"]).proxy == "http://p:3128")
    #expect(try configuration(["HTTPS_PROXY": "http://p:3128", "NO_PROXY": "x, .huggingface.co"]).proxy == nil)
    #expect(try configuration(["HTTPS_PROXY": "http://p:3128", "NO_PROXY": "face.co"]).proxy == "http://p:3128")
  }

  /// Expected values are those of Python's `fnmatch.fnmatchcase`.
  @Test(arguments: [
    ("*.json", "config.json", true), ("*.json", "a/b.json", true), ("*.json", "config.jsonl", false),
    ("original/*", "original/a/b", true), ("original/", "original/a/b", true), ("original/", "original", false),
    ("model-0000?-of-*.safetensors", "model-00001-of-00002.safetensors", true), ("[!a]*", "abc", false),
    ("[!a]*", "bbc", true), ("[a-c]x", "bx", true), ("[a-c]x", "dx", false), ("[]]x", "]x", true), ("[x", "[x", true),
    ("", "", true), ("", "a", false), ("*", "", true), ("**a*", "bab", true), ("A*", "abc", false),
    ("[c-a]", "b", false),
    ("a?c", "aüc", true), ("*a*a*a*a*a*b", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", false),
  ]) func patterns(pattern: String, text: String, isMatch: Bool) {
    #expect(Glob(pattern).matches(text) == isMatch)
  }

  @Test func choices() throws {
    func choose(_ names: [String], _ change: (inout FileSelection) -> Void = { _ in }) throws -> [String] {
      var selection = FileSelection()
      change(&selection)
      let files = names.map { HubFile(path: $0, size: 1, etag: String(repeating: "a", count: 40)) }
      return try selection.choose(from: files, of: "a/b").files.map(\.path)
    }
    let many = [
      "README.md", "chat_template.jinja", "config.json", "consolidated.safetensors", "flax_model.msgpack", "merges.txt",
      "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
      "modeling_x.py", "onnx/model.onnx", "original/model.safetensors", "params.json", "pytorch_model.bin",
      "pytorch_model.bin.index.json", "tekken.json", "tokenizer.model", "vocab.json",
      "additional_chat_templates/rag.jinja",
    ]
    #expect(
      try choose(many) == [
        "chat_template.jinja", "config.json", "merges.txt", "model.safetensors.index.json", "params.json",
        "tekken.json",
        "tokenizer.model", "vocab.json", "additional_chat_templates/rag.jinja", "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
      ])
    #expect(
      try choose(["model.safetensors", "model.fp16.safetensors", "config.json"]) == [
        "config.json", "model.safetensors",
      ])
    // How an embedding model pools is a configuration too.
    #expect(
      try choose(["1_Pooling/config.json", "a/1_Pooling/config.json", "model.safetensors", "modules.json"]) == [
        "1_Pooling/config.json", "modules.json", "model.safetensors",
      ])
    #expect(
      try choose(many) {
        $0.exclude = ["*.safetensors*", "[!c]*"]; $0.include = ["*"]
      } == ["chat_template.jinja", "config.json"])
    #expect(try choose(many) { $0.takesAll = true }.count == many.count)
    #expect(try choose(many) { $0.purpose = .tokenizer }.allSatisfy { !$0.hasSuffix(".safetensors") })
    for (names, part) in [
      (["pytorch_model.bin", "config.json"], "pytorch_model.bin"), ([], "no file"),
      (["x-IQ1_S.gguf", "x-IQ2_S.gguf"], "x-IQ1_S"),
    ] {
      do {
        _ = try choose(names)
        Issue.record("\(names) hold no model that could be chosen")
      } catch let error as HubError {
        #expect(error.kind == .nothingToPull)
        #expect(error.message.contains(part), "\(error.message)")
      }
    }
    // Forms as publishers spell them.
    let gguf = [
      "Llama-Q4_K_M.gguf", "Llama-UD-Q4_K_XL.gguf", "Llama.Q6_K.gguf", "llama-q8_0-00001-of-00002.gguf",
      "llama-q8_0-00002-of-00002.gguf", "BF16/Llama-00001-of-00001.gguf", "mmproj-BF16.gguf",
    ]
    func form(_ name: String) throws -> [String] { try choose(gguf) { $0.quantization = name } }
    #expect(try form("Q4_K_M") == ["Llama-Q4_K_M.gguf"])
    #expect(try form("q4_k_xl") == ["Llama-UD-Q4_K_XL.gguf"])
    #expect(try form("UD-Q4_K_XL") == ["Llama-UD-Q4_K_XL.gguf"])
    #expect(try form("Q6_K") == ["Llama.Q6_K.gguf"])
    #expect(try form("Q8_0").count == 2)
    #expect(try form("BF16") == ["BF16/Llama-00001-of-00001.gguf"])
    #expect(throws: HubError.self) { try form("K_M") }
    #expect(try choose(gguf) == ["Llama-Q4_K_M.gguf"])
  }
}
