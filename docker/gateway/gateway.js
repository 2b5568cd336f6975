// Decides about each request, and counts it. Contract: `refusal` gives the HTTP status with which nginx.conf refuses, or
// an empty string; `infer` refuses what is no inference. A key is 256 random bits; what is kept of it is a file named after its SHA-256, so that the check is
// one look into a folder: a key that is added, changed or removed there counts from the next request on.
import fs from 'fs';
import crypto from 'crypto';

const BEARER = /^Bearer (dsk_[A-Za-z0-9_-]{43})$/;
const MODEL = /^\/v2\/models\/([A-Za-z0-9._-]+)/;
const NAME = /^[A-Za-z0-9._-]{1,127}$/;
// Of an X.509 certificate, in hex: the sequence of two times, each a UTCTime (YYMMDD…Z) or a GeneralizedTime (YYYYMMDD…Z).
const VALIDITY = /30(?:1e|20|22)(?:170d(?:3\d){12}5a|180f(?:3\d){14}5a)(?:170d((?:3\d){12})5a|180f((?:3\d){14})5a)/;
const DURATION = 'gateway_request_duration_seconds';
const BUCKET = /_bucket\{(.*),le="([^"]+)"\}$/;
const IN_VAIN = /^(?:499|504|4|200)$/;  // who had no answer and went, or when the time was up; 200: of a gRPC call that broke
const NOT_LOADED = 'has no available versions';
const MOST_SERIES = 65536;  // more than the 2 MiB of `counts` hold; without a number njs gives 1024

// The entry of the key that a request carries: {name, expires, rate_rps, hash}; null where it has none that counts.
function entryOf(r) {
    const match = BEARER.exec(r.headersIn['Authorization'] || '');
    if (!match) {
        return null;
    }
    const hash = crypto.createHash('sha256').update(match[1]).digest('hex');
    const path = `${r.variables.folder}/keys/${hash}.json`;
    try {
        const entry = JSON.parse(fs.readFileSync(path));
        entry.hash = hash;
        return entry.expires === null || entry.expires > Date.now() / 1000 ? entry : null;
    } catch (error) {
        if (error.code !== 'ENOENT') {
            ngx.log(ngx.ERR, `${path} gives no key (${error.message}), so its caller gets 401; the gateway's user must own it`);
        }
        return null;
    }
}

function refusal(r) {
    const entry = entryOf(r);
    if (!entry) {
        return '401';
    }
    r.variables.caller = entry.name;
    r.variables.key = entry.hash;  // of one name there may be several, each with limits of its own
    if (!r.variables.api) {
        return '403';
    }
    const encodings = [r.headersIn['Content-Encoding'], r.headersIn['grpc-encoding']];
    if (encodings.some(each => each && each !== 'identity')) {  // a few bytes could become any number of them in Triton
        return '415';
    }
    const rate = entry.rate_rps || Number(r.variables.default_rate_rps);
    const second = Math.floor(Date.now() / 1000);
    return ngx.shared.rates.incr(`${entry.hash} ${second}`, 1, 0, 2000) > rate ? '429' : '';
}

// -- malformed inferences over HTTP --------------------------------------------------------------
// Triton before 26.05 answers JSON that it cannot read with 500, and ends at sizes too large to allocate and at JSON nested
// deeper than its stack. So what the KServe protocol says of a request is checked here, and Triton sees none that is not one.

const BYTES_OF = {
    BOOL: 1, UINT8: 1, INT8: 1, UINT16: 2, INT16: 2, FP16: 2, BF16: 2, UINT32: 4, INT32: 4, FP32: 4, UINT64: 8, INT64: 8, FP64: 8,
};
const NO_NUMBER = /-?\b(?:NaN|Infinity|Inf)\b/g;  // Triton takes them, JSON has none
const LAX = /[[,:\s]-?(?:0\d|\.)|\.\D/;  // numbers that JSON.parse of njs takes: 01, .5, 1.
const STRING = /"[^"\\]*(?:\\.[^"\\]*)*"(?:\s*:)?/g;  // with the colon that makes it a name
const ESCAPED = /\\\\/g;
const PAIR = /\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}/g;
const HALF = /\\u[dD][89a-fA-F]/;
const PARAMETERS = {
    sequence_start: 'boolean', sequence_end: 'boolean', binary_data_output: 'boolean', priority: 'size', timeout: 'size',
    binary_data: 'boolean', binary_data_size: 'size', classification: 'size', shared_memory_region: 'string',
    shared_memory_byte_size: 'size', shared_memory_offset: 'size',
};

// Content handler of an inference: refuses it, or hands it on as it came.
function infer(r) {
    const reason = flawOfRequest(r);
    if (reason) {
        r.return(400, `${JSON.stringify({ error: `malformed request: ${reason}` })}\n`);
    } else {
        r.internalRedirect('@triton');
    }
}

function flawOfRequest(r) {
    const file = r.variables.request_body_file;  // of a large one, which nginx keeps until the end of the request
    const body = file ? fs.readFileSync(file) : r.requestBuffer || Buffer.alloc(0), size = body.length;
    const said = r.headersIn['Inference-Header-Content-Length'];
    if (said !== undefined && (!/^\d{1,15}$/.test(said) || Number(said) > size)) {
        return `Inference-Header-Content-Length is ${said.slice(0, 40)}, of a body of ${size} bytes`;
    }
    const length = said === undefined ? size : Number(said);
    if (said !== undefined && length === 0) {
        return '';  // tensors alone: of them Triton knows all from the model
    }
    let document, flaw;
    try {
        const text = body.slice(0, length).toString();
        document = parsed(text);
        const lax = LAX.test(text) && LAX.test(text.replace(STRING, ' '));
        flaw = lax ? 'no JSON: a number like 01, .5 or 1.' : flawOfStrings(text.match(STRING) || [], document);
    } catch (error) {
        return `no JSON: ${error.message}`;
    }
    return flaw || flawOf(document, size - length);
}

// What JSON.parse takes, and Triton reads otherwise or not at all: of a name that comes twice Triton sees the first value,
// so that what is looked at here would not be what it gets; half a character it cannot read.
function flawOfStrings(strings, document) {
    if (strings.filter(each => each.endsWith(':')).length !== namesIn(document)) {
        return 'a name comes twice';
    }
    return strings.some(each => each.includes('\\u') && HALF.test(each.replace(ESCAPED, ' ').replace(PAIR, ' '))) ? 'half a character' : '';
}

function namesIn(value) {
    const below = isObject(value) ? Object.keys(value).map(name => value[name]) : Array.isArray(value) ? value : [];
    const own = isObject(value) ? below.length : 0;
    return below.reduce((sum, each) => each !== null && typeof each === 'object' ? sum + namesIn(each) : sum, own);
}

function parsed(text) {
    try {
        return JSON.parse(text);
    } catch (error) {
        if (text.search(NO_NUMBER) < 0) {
            throw error;
        }
        return JSON.parse(text.replace(NO_NUMBER, '0.5'));
    }
}

function isObject(value) {
    return value !== null && typeof value === 'object' && !Array.isArray(value);
}

function isSize(value) {
    return typeof value === 'number' && value >= 0 && value <= 9007199254740991 && Math.floor(value) === value;
}

// What is wrong with a request, '' if nothing is; `tail` is how many bytes follow the JSON.
function flawOf(document, tail) {
    if (!isObject(document) || !Array.isArray(document.inputs)) {
        return 'it must be an object with a list "inputs"';
    }
    if (document.id !== undefined && typeof document.id !== 'string') {
        return '"id" must be a string';
    }
    const outputs = document.outputs === undefined ? [] : document.outputs;
    if (!Array.isArray(outputs) || !outputs.every(each => isObject(each) && typeof each.name === 'string')) {
        return '"outputs" must be a list of objects with a "name"';
    }
    let flaw = flawOfParameters(document.parameters), left = tail;
    outputs.forEach(each => { flaw = flaw || flawOfParameters(each.parameters); });
    document.inputs.forEach(each => {
        flaw = flaw || flawOfInput(each);
        left -= flaw ? 0 : (each.parameters || {}).binary_data_size || 0;
    });
    return flaw || (left ? `${tail} bytes follow the JSON, the inputs name ${tail - left}` : '');
}

function flawOfParameters(parameters) {
    if (parameters === undefined) {
        return '';
    }
    if (!isObject(parameters)) {
        return '"parameters" must be an object';
    }
    const wrong = Object.keys(parameters).find(name => {
        const value = parameters[name], kind = PARAMETERS[name];
        if (name === 'sequence_id') {
            return !isSize(value) && (typeof value !== 'string' || value.length > 128);
        }
        return kind === 'size' ? !isSize(value) : kind ? typeof value !== kind : value === null || typeof value === 'object';
    });
    return wrong === undefined ? '' : `parameter ${JSON.stringify(wrong.slice(0, 40))} is of a wrong type`;
}

function flawOfInput(input) {
    if (!isObject(input) || typeof input.name !== 'string' || typeof input.datatype !== 'string') {
        return 'an input must be an object with the strings "name" and "datatype"';
    }
    const name = `input ${JSON.stringify(input.name.slice(0, 40))}`;
    if (!Array.isArray(input.shape) || !input.shape.every(isSize)) {
        return `${name}: "shape" must be a list of sizes`;
    }
    const flaw = flawOfParameters(input.parameters), parameters = input.parameters || {};
    if (flaw) {
        return `${name}: ${flaw}`;
    }
    const count = input.shape.reduce((product, each) => product * each, 1), width = BYTES_OF[input.datatype];
    if (parameters.shared_memory_region !== undefined) {
        return '';  // none can be made known from here, and Triton says so
    }
    if (parameters.binary_data_size !== undefined) {
        return width === undefined || count * width === parameters.binary_data_size ? '' : `${name}: ${count} values of \
${input.datatype}, and ${parameters.binary_data_size} bytes`;
    }
    const found = { count: 0, wrong: 0 };
    countValues(input.data, kindOf(input.datatype), found);
    if (!Array.isArray(input.data) || found.wrong) {
        return `${name}: "data" must be a list of values of ${input.datatype.slice(0, 40)}`;
    }
    return found.count === count ? '' : `${name}: ${count} values by its shape, ${found.count} in "data"`;
}

function kindOf(datatype) {
    return datatype === 'BYTES' ? 'string' : datatype === 'BOOL' ? 'boolean' : /^(INT|UINT)/.test(datatype) ? 'integer' : 'number';
}

// Counts the values of a list of any depth, and those that are none of a kind.
function countValues(data, kind, found) {
    if (Array.isArray(data)) {
        data.forEach(each => countValues(each, kind, found));
        return;
    }
    found.count += 1;
    const finite = typeof data === 'number' && isFinite(data);
    const whole = finite && Math.floor(data) === data && Math.abs(data) < 18446744073709551616;
    const right = kind === 'integer' ? whole : kind === 'number' ? finite : typeof data === kind;
    found.wrong += right ? 0 : 1;
}

// Header filter of gRPC's answers: bytes that are no message are the caller's fault, for which gRPC's library says INTERNAL;
// a model that is being loaded anew is not, for which Triton says NOT_FOUND.
function blame(r) {
    const status = r.headersOut['grpc-status'], message = r.headersOut['grpc-message'] || '';
    if (status === '13' && message.startsWith('Unable to parse request')) {
        r.headersOut['grpc-status'] = '3';
    } else if (status === '5' && message.includes(NOT_LOADED)) {
        r.headersOut['grpc-status'] = '14';
        r.headersOut['grpc-retry-pushback-ms'] = '100';
    }
}

// The same of an inference over HTTP, whose reason is in the body: callers get Triton's 404, which is counted as 503.
function excused(r, data, flags) {
    if (r.status === 404 && data.toString().includes(NOT_LOADED)) {
        r.variables.not_loaded = '1';
    }
    if (data.length) {
        r.done();  // it stands in the first part of the answer
    }
    r.sendBuffer(data, flags);
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
// become labels, so that no caller can make up more: over gRPC the request's own name is inside its message. Of those that no
// model answered only who waited in vain is timed: a failure is counted by its status already, and a caller may send slowly.
function observed(r) {
    const variables = r.variables;
    const grpc = variables.sent_http_grpc_status || variables.upstream_trailer_grpc_status || '';
    const protocol = (variables.content_type || '').startsWith('application/grpc') ? 'grpc' : 'http';
    const path = MODEL.exec(variables.status === '200' ? variables.request_uri : '');
    const model = variables.answered || (path ? path[1] : '');
    const labels = `protocol="${protocol}",api="${variables.api || 'other'}",model="${model}"`;
    const status = grpc || (variables.not_loaded ? '503' : variables.status);
    const counts = ngx.shared.counts;
    try {
        counts.incr(`gateway_requests_total{${labels},status="${status}"}`, 1, 0);
        if (variables.api === 'infer' && !variables.refusal && (model || IN_VAIN.test(status))) {
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

// When the certificate that is served ends, in seconds since 1970, NaN if it cannot be read: of the first, the gateway's own.
function certificateEnd(run) {
    let pem = '';
    try {
        pem = fs.readFileSync(`${run}/served.crt`).toString().split('-----')[2] || '';
    } catch (error) {  // somebody has emptied the folder
    }
    const found = VALIDITY.exec(Buffer.from(pem.replace(/\s/g, ''), 'base64').toString('hex'));
    if (!found) {
        return NaN;
    }
    const text = Buffer.from(found[1] || found[2], 'hex').toString();
    const full = found[2] ? text : (text < '50' ? '20' : '19') + text;  // RFC 5280: two digits are 1950 to 2049
    return Date.parse(full.replace(/(....)(..)(..)(..)(..)(..)/, '$1-$2-$3T$4:$5:$6Z')) / 1000;
}

// Whether certificate, key, limits or addresses have a change that cannot be loaded (gateway.sh).
function isPending(run) {
    try {
        fs.accessSync(`${run}/pending`);
        return true;
    } catch (error) {
        return false;
    }
}

function numberOf(bound) {
    return bound === '+Inf' ? Infinity : Number(bound);
}

// What has been counted, as Prometheus reads it. Kept is how many fell into each bucket; shown, how many up to its bound.
// The counts outlive a change of limits.conf: buckets of bounds that are no longer there count for those above them.
function metrics(r) {
    const counts = {}, fell = {};
    ngx.shared.counts.items(MOST_SERIES).forEach(item => { counts[item[0]] = item[1]; });
    const names = Object.keys(counts).sort();
    let text = '# TYPE gateway_requests_total counter\n';
    names.filter(name => name.startsWith('gateway_requests_total')).forEach(name => {
        text += `${name} ${counts[name]}\n`;
    });
    names.forEach(name => {
        const found = BUCKET.exec(name);
        if (found) {
            fell[found[1]] = (fell[found[1]] || []).concat({ bound: numberOf(found[2]), count: counts[name] });
        }
    });
    text += `# TYPE ${DURATION} histogram\n`;
    const bounds = r.variables.buckets_s.split(' ').concat('+Inf');
    Object.keys(fell).forEach(labels => {
        const upTo = bound => fell[labels].reduce((sum, each) => each.bound <= bound ? sum + each.count : sum, 0);
        bounds.forEach(bound => { text += `${DURATION}_bucket{${labels},le="${bound}"} ${upTo(numberOf(bound))}\n`; });
        text += `${DURATION}_sum{${labels}} ${counts[`${DURATION}_sum{${labels}}`] || 0}\n`;
        text += `${DURATION}_count{${labels}} ${upTo(Infinity)}\n`;
    });
    text += '# TYPE gateway_certificate_expiry_timestamp_seconds gauge\n';
    text += `gateway_certificate_expiry_timestamp_seconds ${certificateEnd(r.variables.run)}\n`;
    text += '# TYPE gateway_reload_pending gauge\n';
    text += `gateway_reload_pending ${isPending(r.variables.run) ? 1 : 0}\n`;
    r.headersOut['Content-Type'] = 'text/plain; version=0.0.4';
    r.return(200, text);
}

export default { refusal, infer, blame, excused, answered, observed, metrics };
