//! Clients of the service `grpc`, with tonic.

mod common;

use common::{Front, soon};
use tonic::{
    Streaming,
    transport::{Channel, Endpoint},
};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus,
    health_client::HealthClient,
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_grpc");

async fn connect(front: &Front) -> HealthClient<Channel> {
    let endpoint = Endpoint::from_shared(format!("http://{}", front.address)).unwrap();
    HealthClient::new(soon("a connection", endpoint.connect()).await.unwrap())
}

/// Makes a unary call. Returns the process that has answered.
async fn check(client: &mut HealthClient<Channel>) -> String {
    loop {
        match soon("an answer", client.check(HealthCheckRequest::default())).await {
            Ok(answer) => {
                return answer.metadata().get("worker").unwrap().to_str().unwrap().to_owned();
            }
            // tonic's client had not sent the call yet when the GOAWAY came.
            Err(status) => assert_eq!(status.message(), "operation was canceled"),
        }
    }
}

async fn watch(client: &mut HealthClient<Channel>) -> Streaming<HealthCheckResponse> {
    let call = client.watch(HealthCheckRequest::default());
    let mut stream = soon("a stream", call).await.unwrap().into_inner();
    assert_eq!(next(&mut stream).await, ServingStatus::Serving);
    stream
}

async fn next(stream: &mut Streaming<HealthCheckResponse>) -> ServingStatus {
    soon("a message", stream.message()).await.unwrap().expect("no end").status()
}

#[tokio::test]
async fn a_stream_goes_on_while_new_calls_of_its_client_go_to_the_new_worker() {
    let front = Front::start(PROGRAM, 30).await;
    let mut client = connect(&front).await;
    let old = check(&mut client).await;
    let mut stream = watch(&mut client).await;

    front.signal("-HUP").await;
    // The worker has sent this message after its drain had begun.
    assert_eq!(next(&mut stream).await, ServingStatus::NotServing);
    // The client receives a GOAWAY sooner or later, and then connects again by itself.
    while check(&mut client).await == old {}
    let mut other = watch(&mut client).await;
    // Both streams stay open, the old one at the old worker.
    let silent = std::time::Duration::from_millis(200);
    assert!(tokio::time::timeout(silent, stream.message()).await.is_err());
    assert!(tokio::time::timeout(silent, other.message()).await.is_err());

    // When the old stream has ended, the old worker leaves.
    drop(stream);
    drop((other, client));
    front.end().await;
}

#[tokio::test]
async fn a_stream_that_does_not_end_is_cut_at_the_limit() {
    let mut front = Front::start(PROGRAM, 2).await;
    let mut client = connect(&front).await;
    let old = check(&mut client).await;
    let mut stream = watch(&mut client).await;
    front.signal("-HUP").await;
    assert_eq!(next(&mut stream).await, ServingStatus::NotServing);
    assert_eq!(front.line(&format!("worker {old}: ")).await, "1 connections are cut");
    soon("the end", stream.message()).await.unwrap_err();
    assert_ne!(check(&mut client).await, old);
    drop(client);
    front.end().await;
}
