//! axum as the server of the connections that a worker adopts.

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

/// The time between the beginning of a drain and the end of silent connections. A request that is
/// on its way arrives in this time, and its answer has `Connection: close`.
const GRACE: Duration = Duration::from_millis(100);

impl Incoming {
    /// Serves an axum application until there is nothing more to do: the dispatcher has drained
    /// this worker, or has gone, and every request is answered. The process may end then.
    ///
    /// Handlers get the client's address as [`ConnectInfo<Address>`](axum::extract::ConnectInfo).
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
    /// Dropping this future [drains](super::IncomingHandle::drain) the worker.
    pub async fn serve_axum(self, app: Router) -> IncomingEnd {
        let handle = self.handle();
        let (ended, requested) = (handle.ended(), handle.drain_requested());
        // Mark the last answer of each connection.
        let mark_last = map_response(move |response: Response| {
            let is_draining = handle.is_draining();
            async move { (is_draining.then_some([(CONNECTION, "close")]), response) }
        });
        let app = app.layer(mark_last).into_make_service_with_connect_info::<Address>();
        let stop = async {
            requested.await;
            sleep(GRACE).await;
        };
        let serving = axum::serve(self, app).with_graceful_shutdown(stop).into_future();
        // Serve in a spawned task. Outside of a task, as in `main`, each connection might have to
        // wake one more thread. Dropping the `JoinSet` aborts the task.
        let mut task = JoinSet::new();
        task.spawn(serving);
        // The task only fails if it panics. In that case `self` is dropped, which drains.
        task.join_next().await;
        ended.await
    }
}

/// A listener for `axum::serve`, if [`serve_axum`](Incoming::serve_axum) does not suffice.
///
/// By itself `axum::serve` never returns: after the end of the stream it waits for a connection
/// that never comes. Give it a graceful shutdown, as
/// [`IncomingHandle`](crate::handoff::IncomingHandle) shows. Otherwise the process outlives its
/// dispatcher.
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
            "no more connections will come, but axum::serve does not return; \
             give it a graceful shutdown"
        );
        pending().await
    }

    /// # Errors
    /// Always returns an error, because each connection has its own
    /// [local address](Connection::local_addr).
    fn local_addr(&self) -> io::Result<Address> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "each connection has its own local address"))
    }
}

/// Provides the client's address for `into_make_service_with_connect_info::<Address>()`.
impl Connected<IncomingStream<'_, Incoming>> for Address {
    fn connect_info(connection: IncomingStream<'_, Incoming>) -> Self {
        connection.remote_addr().clone()
    }
}
