//! axum serves what is handed over.

use std::{
    future::{IntoFuture, pending},
    io,
    time::Duration,
};

use axum::{
    Router,
    extract::connect_info::Connected,
    http::header::CONNECTION,
    middleware::map_response,
    response::Response,
    serve::{IncomingStream, Listener},
};
use tokio::{task::JoinSet, time::sleep};
use tracing::warn;

use super::{Incoming, IncomingEnd};
use crate::handoff::{Address, Connection};

/// At the end, the time for requests that are on their way. With its answer a client learns that it
/// was the last one; connections that are silent are ended then.
const GRACE: Duration = Duration::from_millis(100);

impl Incoming {
    /// Serves an axum application until there is nothing more to do: the dispatcher has drained
    /// this worker, or has gone, and every request is answered. The process may end then.
    ///
    /// Handlers find the client's address as [`ConnectInfo<Address>`](axum::extract::ConnectInfo).
    ///
    /// Once the worker takes no more connections, answers have `Connection: close`, and after a
    /// moment connections that are silent are ended. A connection that is busy ends with its
    /// answer, however long that takes.
    ///
    /// ```no_run
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> std::io::Result<()> {
    /// use axum::{Router, routing::get};
    /// use fdwire::handoff::Incoming;
    ///
    /// let app = Router::new().route("/", get(|| async { "hello" }));
    /// Incoming::from_stdin()?.serve_axum(app).await;
    /// # Ok(()) }
    /// ```
    ///
    /// # Cancel safety
    /// Dropping it is a [drain](super::IncomingHandle::drain).
    pub async fn serve_axum(self, app: Router) -> IncomingEnd {
        let handle = self.handle();
        let (ended, requested) = (handle.ended(), handle.drain_requested());
        let last = map_response(move |response: Response| {
            let is_draining = handle.is_draining();
            async move { (is_draining.then_some([(CONNECTION, "close")]), response) }
        });
        let app = app.layer(last).into_make_service_with_connect_info::<Address>();
        let stop = async {
            requested.await;
            sleep(GRACE).await;
        };
        let serving = axum::serve(self, app).with_graceful_shutdown(stop).into_future();
        // In a task: elsewhere, as in `main`, each connection might have to wake one thread more.
        // Dropping the set aborts it.
        let mut task = JoinSet::new();
        task.spawn(serving);
        // Never an error, unless it panics; then `self` is dropped, which drains.
        task.join_next().await;
        ended.await
    }
}

/// For `axum::serve`, if [`serve_axum`](Incoming::serve_axum) does not do. By itself `axum::serve`
/// never returns: after the end of the stream it waits for a connection that does not come. So give
/// it a graceful shutdown, as [`IncomingHandle`](crate::handoff::IncomingHandle) shows, or the
/// process outlives its dispatcher.
impl Listener for Incoming {
    type Io = Connection;
    type Addr = Address;

    async fn accept(&mut self) -> (Connection, Address) {
        if let Some(connection) = self.next().await {
            let peer = connection.peer_addr().clone();
            return (connection, peer);
        }
        let end = self.handle().ended().await;
        sleep(10 * GRACE).await;
        warn!(
            ?end,
            "nothing more is to be served, but axum::serve goes on: it needs a graceful shutdown"
        );
        pending().await
    }

    /// # Errors
    /// Always: each connection has a [local address](Connection::local_addr) of its own.
    fn local_addr(&self) -> io::Result<Address> {
        Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "each connection has a local address of its own",
        ))
    }
}

/// The client's address, for `into_make_service_with_connect_info::<Address>()`.
impl Connected<IncomingStream<'_, Incoming>> for Address {
    fn connect_info(connection: IncomingStream<'_, Incoming>) -> Self {
        connection.remote_addr().clone()
    }
}
