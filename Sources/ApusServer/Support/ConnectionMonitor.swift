import NIOCore
import Synchronization

/// Tells when the client of one connection has gone.
final class ConnectionMonitor: Sendable {
  private struct State {
    var isClosed = false
    var nextKey = 0
    var handlers: [Int: @Sendable () -> Void] = [:]
  }

  private let state = Mutex(State())

  /// Calls `handler` once the client has gone, at once if it has gone already. Returns the key for `remove`.
  func onClose(_ handler: @escaping @Sendable () -> Void) -> Int {
    let key: Int? = state.withLock { state in
      if state.isClosed { return nil }
      state.nextKey += 1
      state.handlers[state.nextKey] = handler
      return state.nextKey
    }
    guard let key else {
      handler()
      return 0
    }
    return key
  }

  /// Forgets a handler.
  func remove(_ key: Int) { state.withLock { _ = $0.handlers.removeValue(forKey: key) } }

  /// The client has gone.
  func close() {
    let handlers = state.withLock { state in
      state.isClosed = true
      let handlers = state.handlers
      state.handlers = [:]
      return handlers
    }
    for handler in handlers.values { handler() }
  }
}

/// The monitors of all open connections, found by their channels.
///
/// The channel that a request's context carries cannot hold values of ours, and looking a handler up in its pipeline costs
/// a hop to its event loop per request; a locked dictionary costs a tenth of a microsecond.
final class ConnectionMonitors: Sendable {
  private let monitors = Mutex<[ObjectIdentifier: ConnectionMonitor]>([:])

  /// The monitor of a channel; `nil` if its connection is not a real one (tests without a socket) or is gone.
  func monitor(of channel: any Channel) -> ConnectionMonitor? {
    monitors.withLock { $0[ObjectIdentifier(channel)] }
  }

  /// The number of open connections.
  var count: Int { monitors.withLock { $0.count } }

  fileprivate func insert(_ monitor: ConnectionMonitor, for channel: any Channel) {
    monitors.withLock { $0[ObjectIdentifier(channel)] = monitor }
  }

  fileprivate func remove(_ channel: any Channel) {
    monitors.withLock { _ = $0.removeValue(forKey: ObjectIdentifier(channel)) }
  }
}

/// Watches one connection: reports that its client has gone, and closes it when its client reads nothing for too long.
///
/// The server allows half-closed connections, so a client that goes shows first as the end of its input, while the channel
/// stays open until a write fails. A client of this API that ends its input has gone: HTTP clients keep the connection open
/// in both directions until they have the response (uvicorn, which SGLang runs on, judges the same way).
final class ConnectionHandler: ChannelInboundHandler, RemovableChannelHandler {
  typealias InboundIn = NIOAny

  private let monitor = ConnectionMonitor()
  private let monitors: ConnectionMonitors
  private let stalledWriteTimeout: TimeAmount
  private var stallTimer: Scheduled<Void>?

  init(monitors: ConnectionMonitors, stalledWriteTimeout: TimeAmount) {
    self.monitors = monitors
    self.stalledWriteTimeout = stalledWriteTimeout
  }

  func handlerAdded(context: ChannelHandlerContext) { monitors.insert(monitor, for: context.channel) }

  func handlerRemoved(context: ChannelHandlerContext) {
    stallTimer?.cancel()
    monitors.remove(context.channel)
    monitor.close()
  }

  func channelInactive(context: ChannelHandlerContext) {
    stallTimer?.cancel()
    monitors.remove(context.channel)
    monitor.close()
    context.fireChannelInactive()
  }

  func userInboundEventTriggered(context: ChannelHandlerContext, event: Any) {
    if let event = event as? ChannelEvent, event == .inputClosed { monitor.close() }
    context.fireUserInboundEventTriggered(event)
  }

  func errorCaught(context: ChannelHandlerContext, error: any Error) {
    if error is IOError { monitor.close() }
    context.fireErrorCaught(error)
  }

  func channelWritabilityChanged(context: ChannelHandlerContext) {
    if context.channel.isWritable {
      stallTimer?.cancel()
      stallTimer = nil
    } else if stallTimer == nil {
      let channel = context.channel
      stallTimer = context.eventLoop.scheduleTask(in: stalledWriteTimeout) { channel.close(promise: nil) }
    }
    context.fireChannelWritabilityChanged()
  }
}
