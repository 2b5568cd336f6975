// Decides about each request, and counts it. Contract: `refusal` gives the HTTP status with which nginx.conf refuses, or
// an empty string. A key is 256 random bits; what is kept of it is a file named after its SHA-256, so that the check is
// one look into a folder: a key that is added, changed or removed there counts from the next request on.
import fs from 'fs';
import crypto from 'crypto';

const BEARER = /^Bearer (dsk_[A-Za-z0-9_-]{43})$/;
const MODEL = /^\/v2\/models\/([A-Za-z0-9._-]+)/;
const NAME = /^[A-Za-z0-9._-]{1,127}$/;
// Of an X.509 certificate, in hex: the sequence of two times, each a UTCTime (YYMMDD…Z) or a GeneralizedTime (YYYYMMDD…Z).
const VALIDITY = /30(?:1e|20|22)(?:170d(?:3\d){12}5a|180f(?:3\d){14}5a)(?:170d((?:3\d){12})5a|180f((?:3\d){14})5a)/;
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

// Notes which model answered over gRPC: the first field of a ModelInferResponse, behind five bytes that frame the message.
function answered(r, data, flags) {
    if (data.length > 7) {
        const name = r.variables.api === 'infer' && data[5] === 0x0a ? data.slice(7, 7 + data[6]).toString() : '';
        r.variables.answered = NAME.test(name) ? name : '';
        r.done();  // the rest of the answer goes by without us
    }
    r.sendBuffer(data, flags);
}

// Counts a request that has been answered, for `metrics`; evaluated once, when it is logged. Only models that answered
// become labels, so that no caller can make up more: over gRPC the request's own name is inside its message.
function observed(r) {
    const variables = r.variables;
    const grpc = variables.sent_http_grpc_status || variables.upstream_trailer_grpc_status || '';
    const protocol = (variables.content_type || '').startsWith('application/grpc') ? 'grpc' : 'http';
    const path = MODEL.exec(variables.status === '200' ? variables.request_uri : '');
    const model = variables.answered || (path ? path[1] : '');
    const labels = `protocol="${protocol}",api="${variables.api || 'other'}",model="${model}"`;
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

// When the certificate ends, in seconds since 1970: of the first in tls.crt, which is the gateway's own.
function certificateEnd(folder) {
    const pem = fs.readFileSync(`${folder}/tls.crt`).toString().split('-----')[2] || '';
    const found = VALIDITY.exec(Buffer.from(pem.replace(/\s/g, ''), 'base64').toString('hex'));
    if (!found) {
        return NaN;
    }
    const text = Buffer.from(found[1] || found[2], 'hex').toString();
    const full = found[2] ? text : (text < '50' ? '20' : '19') + text;  // RFC 5280: two digits are 1950 to 2049
    return Date.parse(full.replace(/(....)(..)(..)(..)(..)(..)/, '$1-$2-$3T$4:$5:$6Z')) / 1000;
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
    text += '# TYPE gateway_certificate_expiry_timestamp_seconds gauge\n';
    text += `gateway_certificate_expiry_timestamp_seconds ${certificateEnd(r.variables.folder)}\n`;
    r.headersOut['Content-Type'] = 'text/plain; version=0.0.4';
    r.return(200, text);
}

export default { refusal, answered, observed, metrics };
