import Glibc

/// A thread of one's own, for work that blocks: the engine's loop may not sit on the cooperative pool, where a step of
/// milliseconds would keep every task waiting.
final class EngineThread: @unchecked Sendable {
  // Unchecked: `handle` is written once, before the object is shared.
  private var handle = pthread_t()

  private final class Body {
    let name: String
    let run: () -> Void
    init(name: String, run: @escaping () -> Void) {
      self.name = name
      self.run = run
    }
  }

  /// Starts the thread. `name` is cut to 15 bytes, which is what Linux shows.
  init(name: String, _ run: sending @escaping () -> Void) {
    let body = Unmanaged.passRetained(Body(name: name, run: run))
    var attributes = pthread_attr_t()
    pthread_attr_init(&attributes)
    // The prefix tree and templates recurse to bounded depths; eight megabytes is the main thread's usual size.
    pthread_attr_setstacksize(&attributes, 8 << 20)
    defer { pthread_attr_destroy(&attributes) }
    let status = pthread_create(
      &handle, &attributes,
      { pointer in
        let body = Unmanaged<Body>.fromOpaque(pointer!).takeRetainedValue()
        _ = String(body.name.prefix(15)).withCString { pthread_setname_np(pthread_self(), $0) }
        body.run()
        return nil
      }, body.toOpaque())
    precondition(status == 0, "The system refused a thread for the engine.")
  }

  /// Waits until the thread has ended. Blocks; call it from a thread that may.
  func join() { pthread_join(handle, nil) }
}
