// Decides about each request, and counts it. Contract: `refusal` gives the HTTP status with which nginx.conf refuses, or
// an empty string. A key is 256 random bits; what is kept of it is a file named after its SHA-256, so that the check is
// one look into a folder: a key that is added, changed or removed there counts from the next request on.
import fs from 'fs';
import crypto from 'crypto';

const BEARER = /^Bearer (dsk_[A-Za-z0-9_-]{43})$/;
const MODEL = /^\/v2\/models\/([A-Za-z0-9._-]+)/;
const DURATION = 'gateway_request_duration_seconds';

// The entry of the key that a request carries: {name, expires, rate_rps}; null where it has none that counts.
function entryOf(r) {
    const match = BEARER.exec(r.headersIn['Authorization'] || '');
    if (!match) {
        return null;
    }
    const hash = crypto.createHash('sha256').update(match[1]).digest('hex');
    try {
        const entry = JSON.parse(fs.readFileSync(`${r.variables.folder}/keys/${hash}.json`));
        return entry.expires === null || entry.expires > Date.now() / 1000 ? entry : null;
    } catch (error) {
        return null;
    }
}

function refusal(r) {
    const entry = entryOf(r);
    if (!entry) {
        return '401';
    }
    r.variables.caller = entry.name;
    if (!r.variables.api) {
        return '403';
    }
    const encoding = r.headersIn['Content-Encoding'] || r.headersIn['grpc-encoding'] || 'identity';
    if (encoding !== 'identity') {  // a few bytes could become any number of them in Triton
        return '415';
    }
    const rate = entry.rate_rps || Number(r.variables.default_rate_rps);
    const second = Math.floor(Date.now() / 1000);
    return ngx.shared.rates.incr(`${entry.name} ${second}`, 1, 0, 2000) > rate ? '429' : '';
}

// Counts a request that has been answered, for `metrics`; evaluated once, when it is logged. Of gRPC the model is not
// known: its name is inside the message. Only models that answered become labels, so that no caller can make up more.
function observed(r) {
    const variables = r.variables;
    const grpc = variables.sent_http_grpc_status || variables.upstream_trailer_grpc_status || '';
    const protocol = (variables.content_type || '').startsWith('application/grpc') ? 'grpc' : 'http';
    const model = MODEL.exec(variables.status === '200' ? variables.request_uri : '');
    const labels = `protocol="${protocol}",api="${variables.api || 'other'}",model="${model ? model[1] : ''}"`;
    const counts = ngx.shared.counts;
    try {
        counts.incr(`gateway_requests_total{${labels},status="${grpc || variables.status}"}`, 1, 0);
        if (variables.api === 'infer' && !variables.refusal) {
            const seconds = Number(variables.request_time);
            const bound = variables.buckets_s.split(' ').find(each => seconds <= Number(each)) || '+Inf';
            counts.incr(`${DURATION}_bucket{${labels},le="${bound}"}`, 1, 0);
            counts.incr(`${DURATION}_sum{${labels}}`, seconds, 0);
        }
    } catch (error) {
        ngx.log(ngx.WARN, `not counted: ${error.message}`);
    }
    return '';
}

// What has been counted, as Prometheus reads it. Kept is how many fell into each bucket; shown, how many up to its bound.
function metrics(r) {
    const counts = {};
    ngx.shared.counts.items().forEach(item => { counts[item[0]] = item[1]; });
    const names = Object.keys(counts).sort();
    let text = '# TYPE gateway_requests_total counter\n';
    names.filter(name => name.startsWith('gateway_requests_total')).forEach(name => {
        text += `${name} ${counts[name]}\n`;
    });
    text += `# TYPE ${DURATION} histogram\n`;
    const bounds = r.variables.buckets_s.split(' ').concat('+Inf');
    names.filter(name => name.startsWith(`${DURATION}_sum`)).forEach(name => {
        const labels = name.slice(name.indexOf('{') + 1, -1);
        let total = 0;
        bounds.forEach(bound => {
            const bucket = `${DURATION}_bucket{${labels},le="${bound}"}`;
            total += counts[bucket] || 0;
            text += `${bucket} ${total}\n`;
        });
        text += `${name} ${counts[name]}\n${DURATION}_count{${labels}} ${total}\n`;
    });
    r.headersOut['Content-Type'] = 'text/plain; version=0.0.4';
    r.return(200, text);
}

export default { refusal, observed, metrics };
