//! Generates the gRPC service of `tickets`, without a `.proto` file and its compiler.

use tonic_build::manual::{Builder, Method, Service};

fn main() {
    let count = Method::builder()
        .name("count")
        .route_name("Count")
        .input_type("String") // google.protobuf.StringValue
        .output_type("u64") // google.protobuf.UInt64Value
        .codec_path("tonic_prost::ProstCodec")
        .build();
    let counter = Service::builder().name("Counter").package("tickets").method(count).build();
    Builder::new().compile(&[counter]);
}
