//! Handles of all metrics, registered once.

use im_proto::StatusCode;
use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};

use crate::{addresses::Excess, connection::Transport};

/// The gateway's metrics.
pub(crate) struct Metrics {
    pub accepted: [Counter; Transport::ALL.len()],
    pub connections: Gauge,
    pub sessions: Gauge,
    pub refused_full: Counter,
    pub refused_uneven: Counter,
    pub refused_handshakes: Counter,
    pub refused_draining: Counter,
    pub dropped: Counter,
    pub limited_sends: Counter,
    pub limited_user_sends: Counter,
    pub limited_frames: Counter,
    pub limited_bytes: Counter,
    pub limited_locates: Counter,
    pub limited_renewals: Counter,
    limited_address_connects: Counter,
    limited_address_connections: Counter,
    limited_address_failures: Counter,
    pub quic_retries: Counter,
    pub accept_waits: Counter,
    pub transport_failures: Counter,
    pub frames_in: Counter,
    pub bytes_in: Counter,
    pub bytes_out: Counter,
    pub frames_unknown: Counter,
    pub frames_refused: Counter,
    pub sends: Counter,
    pub sends_refused: Counter,
    pub sends_again: Counter,
    pub acks: Counter,
    pub ack_seconds: Histogram,
    pub calls: Counter,
    pub calls_unavailable: Counter,
    pub pushes: Counter,
    pub pushes_dropped: Counter,
    pub resyncs: Counter,
    pub audiences_wanted: Counter,
    pub sessions_moved: Counter,
    pub ephemeral_dropped: Counter,
    pub links_up: Gauge,
    pub link_failures: Counter,
    pub link_losses: Counter,
    /// By the status of the `Close`, in the order of [`StatusCode::ALL`].
    closes: Vec<Counter>,
}

impl Metrics {
    pub fn new() -> Self {
        Self {
            accepted: Transport::ALL
                .map(|transport| counter!("im_gateway_connections_accepted_total", "transport" => transport.as_str())),
            connections: gauge!("im_gateway_connections_count"),
            sessions: gauge!("im_gateway_sessions_count"),
            refused_full: counter!("im_gateway_connections_refused_total", "reason" => "full"),
            refused_uneven: counter!("im_gateway_connections_refused_total", "reason" => "uneven"),
            refused_handshakes: counter!("im_gateway_connections_refused_total", "reason" => "handshakes"),
            refused_draining: counter!("im_gateway_connections_refused_total", "reason" => "draining"),
            dropped: counter!("im_gateway_connections_dropped_total"),
            limited_sends: counter!("im_gateway_limited_total", "limit" => "sends"),
            limited_user_sends: counter!("im_gateway_limited_total", "limit" => "user sends"),
            limited_frames: counter!("im_gateway_limited_total", "limit" => "frames"),
            limited_bytes: counter!("im_gateway_limited_total", "limit" => "bytes"),
            limited_locates: counter!("im_gateway_limited_total", "limit" => "locates"),
            limited_renewals: counter!("im_gateway_limited_total", "limit" => "renewals"),
            limited_address_connects: counter!("im_gateway_limited_total", "limit" => "address connects"),
            limited_address_connections: counter!("im_gateway_limited_total", "limit" => "address connections"),
            limited_address_failures: counter!("im_gateway_limited_total", "limit" => "address failures"),
            quic_retries: counter!("im_gateway_quic_retries_total"),
            accept_waits: counter!("im_gateway_accept_waits_total"),
            transport_failures: counter!("im_gateway_transport_handshake_failures_total"),
            frames_in: counter!("im_gateway_frames_received_total"),
            bytes_in: counter!("im_gateway_received_bytes_total"),
            bytes_out: counter!("im_gateway_sent_bytes_total"),
            frames_unknown: counter!("im_gateway_frames_unknown_total"),
            frames_refused: counter!("im_gateway_frames_refused_total"),
            sends: counter!("im_gateway_sends_total"),
            sends_refused: counter!("im_gateway_sends_refused_total"),
            sends_again: counter!("im_gateway_sends_again_total"),
            acks: counter!("im_gateway_send_acks_total"),
            ack_seconds: histogram!("im_gateway_ack_seconds"),
            calls: counter!("im_gateway_calls_total"),
            calls_unavailable: counter!("im_gateway_calls_unavailable_total"),
            pushes: counter!("im_gateway_pushes_total"),
            pushes_dropped: counter!("im_gateway_pushes_dropped_total"),
            resyncs: counter!("im_gateway_resyncs_total"),
            audiences_wanted: counter!("im_gateway_audiences_wanted_total"),
            sessions_moved: counter!("im_gateway_sessions_moved_total"),
            ephemeral_dropped: counter!("im_gateway_ephemeral_dropped_total"),
            links_up: gauge!("im_gateway_links_up_count"),
            link_failures: counter!("im_gateway_link_failures_total"),
            link_losses: counter!("im_gateway_link_losses_total"),
            closes: StatusCode::ALL
                .iter()
                .map(|code| counter!("im_gateway_closes_total", "status" => code.text()))
                .collect(),
        }
    }

    /// The counter of an address over a limit.
    pub fn limited_address(&self, excess: Excess) -> &Counter {
        match excess {
            Excess::Connects(_) => &self.limited_address_connects,
            Excess::Connections => &self.limited_address_connections,
            Excess::Failures(_) => &self.limited_address_failures,
        }
    }

    /// Counts a `Close` that the server sent.
    pub fn closed(&self, code: u32) {
        let index = StatusCode::ALL.iter().position(|known| known.number() == code);
        if let Some(counter) = index.and_then(|index| self.closes.get(index)) {
            counter.increment(1);
        }
    }
}
