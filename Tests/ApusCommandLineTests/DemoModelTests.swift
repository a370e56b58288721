import ApusCommandLine
import Testing

@Suite struct DemoModelTests {
  private func found(_ executable: String?, _ files: Set<String>) -> String? {
    demoModelPath(executable: executable, exists: { files.contains($0) })
  }

  @Test func theDemoModelIsFoundFromWhereverTheProgramWasStarted() {
    let build = "/home/a/apus/.build/x86_64-unknown-linux-gnu/release/apus"
    let clone = "/home/a/apus/Models/apus-demo"
    #expect(found(build, ["\(clone)/config.json"]) == clone)
    #expect(found(build, ["\(clone)/model.safetensors"]) == nil, "a folder without config.json is no model")
    // The working directory goes first, then what is nearest to the program.
    #expect(found(build, ["\(clone)/config.json", "./Models/apus-demo/config.json"]) == "./Models/apus-demo")
    let beside = "/home/a/apus/.build/x86_64-unknown-linux-gnu/release/Models/apus-demo"
    #expect(found(build, ["\(clone)/config.json", "\(beside)/config.json"]) == beside)
    let installed = "/usr/local/share/apus/Models/apus-demo"
    #expect(found("/usr/local/bin/apus", ["\(installed)/config.json"]) == installed)
    #expect(found("/apus", ["/Models/apus-demo/config.json"]) == "/Models/apus-demo")
    #expect(found(build, []) == nil && found(nil, []) == nil)
    #expect(found("/a/b/c/d/e/f/g/h/apus", ["/a/Models/apus-demo/config.json"]) == nil)
  }
}
