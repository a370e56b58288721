import ApusCore
import Hummingbird

extension ServerState {
  private func recorder() throws(EngineError) -> any ExpertLoadService {
    guard let loads = service.expertLoads else {
      throw EngineError(
        .invalidRequest,
        "The loads of experts are not recorded here; start the server with --expert-distribution-recorder-mode and a "
          + "model that has experts.")
    }
    return loads
  }

  private func report(_ loads: any ExpertLoadService, _ message: String) -> Response {
    Response { writer in
      writer.member("success", true)
      writer.member("message", message)
      writer.member("is_recording", loads.isRecording)
    }
  }

  /// `GET` or `POST /start_expert_distribution_record`: forgets what was recorded and records from now on.
  func startExpertRecord(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    let loads = try recorder()
    loads.start()
    return report(loads, "The loads of experts are being recorded.")
  }

  /// `GET` or `POST /stop_expert_distribution_record`: records no more.
  func stopExpertRecord(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    let loads = try recorder()
    loads.stop()
    return report(loads, "The loads of experts are no longer recorded.")
  }

  /// `GET` or `POST /dump_expert_distribution_record`: what was recorded, which is forgotten.
  func dumpExpertRecord(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    var writer = JSONWriter()
    writer.value(try recorder().dump())
    return Response(json: writer)
  }
}
